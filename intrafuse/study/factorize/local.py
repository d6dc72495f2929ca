"""Run workers as processes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intrafuse.study.factorize.worker import PROGRESS, Report, Task
from intrafuse.support.errors import IntrafuseError

__all__ = ["LOG", "Failure", "run_local"]

LOG = "log.txt"
POLL = 0.2  # seconds
LINES = 3  # last lines of a log that an error shows
FULL = 2**16  # a disk with fewer free bytes counts as full


@dataclass(frozen=True)
class Failure:
    """A worker that failed after all retries: the number of its part, and the end of its log."""

    part: int
    reason: str


def run_local(
    folders: Sequence[Path], tasks: Sequence[Task], *, parallel: int, retries: int, report: Report
) -> list[Failure]:
    """Run workers, a few at a time, each on a prepared folder.

    Args:
        folders: one folder for each worker.
        tasks: one task for each worker.
        parallel: number of workers at once.
        retries: number of restarts of a failed worker.
        report: called with (stage and worker, steps done, steps in total).

    Returns:
        The workers that failed. All others have finished.
    """
    waiting = [(i, retries) for i in range(len(folders))]
    running: dict[int, tuple[subprocess.Popen, int]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                i, left = waiting.pop(0)
                running[i] = _start(folders[i], tasks[i]), left
            time.sleep(POLL)
            for i, (process, left) in list(running.items()):
                _show(folders[i], tasks[i], report)
                if process.poll() is None:
                    continue
                del running[i]
                if process.returncode and left and process.returncode != 2:
                    waiting.append((i, left - 1))
                elif process.returncode:
                    failed.append(Failure(tasks[i].part, _reason(folders[i], process.returncode)))
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
    return failed


def _start(folder: Path, task: Task) -> subprocess.Popen:
    # The worker gets the same module search path as this process.
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    threads = str(task.threads)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    try:
        with open(folder / LOG, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "intrafuse.study.factorize", str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    except OSError as error:
        raise IntrafuseError(
            f"a worker cannot be started: {error.strerror}", value=str(folder)
        ) from error


def _show(folder: Path, task: Task, report: Report) -> None:
    try:
        name, done, total = json.loads((folder / PROGRESS).read_text("utf-8"))
    except (OSError, ValueError):
        return
    report(f"part {task.part}: {name}", done, total)


def _reason(folder: Path, code: int) -> str:
    """Describe how a worker ended, with the last lines of its log."""
    ended = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    try:
        lines = (folder / LOG).read_text("utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    if shutil.disk_usage(folder).free < FULL:  # the log may be cut off, too
        ended += ", No space left on device"
    return f"{ended}: {' '.join(lines[-LINES:]) or 'no message'} (log: {folder / LOG})"
