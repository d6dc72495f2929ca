"""Run workers on a Ray cluster: a running one, or a new one on this machine."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intrafuse.study.factorize.local import Failure
from intrafuse.study.factorize.worker import (
    POSITIONS,
    TASK,
    Report,
    Task,
    last_stage,
    throttled,
    work,
)
from intrafuse.support.cluster import connected
from intrafuse.support.files import replacing_folder

__all__ = ["run_ray"]

POLL = 0.5  # seconds


class _Board:
    """A shared object to which workers write their progress."""

    def __init__(self) -> None:
        self.lines: dict[int, tuple[str, int, int]] = {}

    def write(self, part: int, name: str, done: int, total: int) -> None:
        """Store one worker's progress."""
        self.lines[part] = (name, done, total)

    def read(self) -> dict[int, tuple[str, int, int]]:
        """Return the progress of all workers."""
        return self.lines


def _remote(run: str, sent: dict[str, bytes], board: Any) -> dict[str, bytes]:
    """Work on one part in a folder of the node, and return the files of the last stage."""
    task = Task.model_validate_json(sent[TASK])
    folder = Path(tempfile.gettempdir()) / "intrafuse-workers" / f"{run}-{task.part}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sent.items():
        (folder / name).write_bytes(content)

    def say(name: str, done: int, total: int) -> None:
        board.write.remote(task.part, name, done, total)

    last = work(folder, throttled(say))
    files = {path.name: path.read_bytes() for path in sorted(last.iterdir())}
    shutil.rmtree(folder, ignore_errors=True)
    return files


def run_ray(
    folders: Sequence[Path],
    tasks: Sequence[Task],
    *,
    address: str | None,
    parallel: int,
    retries: int,
    report: Report,
) -> list[Failure]:
    """Run workers as Ray tasks, and write the returned networks into their folders.

    A worker keeps its stages in the node's folder for temporary files. A restarted worker on the
    same node resumes from there.

    Args:
        folders: one folder for each worker, with task and positions.
        tasks: one task for each worker.
        address: address of a cluster. None uses the running Ray, or starts it on this machine.
        parallel: number of workers at once on a cluster that is started here.
        retries: number of restarts of a failed worker.
        report: called with (stage and worker, steps done, steps in total).

    Raises:
        IntrafuseError: Ray is not installed, or cannot be reached or started.
    """
    with connected(address, parallel) as ray:
        board = ray.remote(num_cpus=0)(_Board).remote()
        ray.get(board.read.remote())  # wait until the board exists
        # Ray restarts a worker after a crash and after an exception.
        remote = ray.remote(num_cpus=1, max_retries=retries, retry_exceptions=True)(_remote)
        waiting = {}
        for folder, task in zip(folders, tasks, strict=True):
            names = [name for name in (TASK, POSITIONS) if (folder / name).exists()]
            sent = {name: (folder / name).read_bytes() for name in names}
            waiting[remote.remote(_run_name(folder, sent), sent, board)] = (folder, task)
        return _collect(ray, board, waiting, report)


def _run_name(folder: Path, sent: dict[str, bytes]) -> str:
    """Return a name that depends on the task and on the folder of the result."""
    told = str(folder.parent.resolve()).encode() + sent[TASK]
    return hashlib.sha256(told).hexdigest()[:16]


def _collect(
    ray: Any, board: Any, waiting: dict[Any, tuple[Path, Task]], report: Report
) -> list[Failure]:
    failed = []
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=POLL)
        for part, line in ray.get(board.read.remote()).items():
            report(f"part {part}: {line[0]}", *line[1:])
        for done in ready:
            folder, task = waiting.pop(done)
            try:
                files = ray.get(done)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                failed.append(Failure(task.part, " ".join(str(cause).split())[-1000:]))
                continue
            with replacing_folder(folder / last_stage(task.recipe)) as temporary:
                for name, content in files.items():
                    (temporary / name).write_bytes(content)
    return failed
