"""Forks of a process that has everything imported: killed at a file event, or running main."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrafuse.__main__ import main

EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR
FINISHED, RAISED = 0, 9


def is_event(event: str, arguments: tuple) -> bool:
    """Tell whether an audit event changes files: opening one for writing, or changing names."""
    if event == "open":
        path, _, flags = arguments
        return bool(flags & WRITING) and path != os.devnull
    return event in EVENTS


def killed(work: Callable[[], object], at: int) -> bool:
    """Run something in a fork that dies before its file event of this number, from 0.

    Returns:
        Whether it came to that event; else it has run to its end.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return _forked(work, at, die) == -signal.SIGKILL


def failed(
    work: Callable[[], object], at: int, expected: type[Exception], *, lasting: bool = False
) -> tuple[bool, bool]:
    """Run something in a fork where the file event of this number fails as on a broken disk.

    Args:
        work: what to run.
        at: number of the event, from 0.
        expected: what it may raise.
        lasting: whether all later events fail too.

    Returns:
        Whether it came to that event, and whether it raised what is expected.
    """
    told = os.memfd_create("told")

    def refuse() -> None:
        os.write(told, b"reached ")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def guarded() -> None:
        try:
            work()
        except expected:
            os.write(told, b"raised")

    try:
        assert _forked(guarded, at, refuse, lasting) == FINISHED
        found = os.pread(told, 10_000, 0)
        return b"reached" in found, b"raised" in found
    finally:
        os.close(told)


def _forked(
    work: Callable[[], object], at: int, act: Callable[[], None], lasting: bool = False
) -> int:
    child = os.fork()
    if child == 0:
        code = RAISED
        try:
            _count(at, act, lasting)
            work()
            code = FINISHED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (FINISHED, -signal.SIGKILL), "the work itself fails"
    return code


def _count(at: int, act: Callable[[], None], lasting: bool) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if is_event(event, arguments):
            seen += 1
            if seen == at + 1 or (lasting and seen > at):
                act()

    sys.addaudithook(hook)


@dataclass(frozen=True)
class Done:
    """What a command did: its exit code, and what it wrote to its streams."""

    code: int
    stdout: bytes
    stderr: bytes


def run_main(
    *arguments: str | bytes, out: str = "", err: str = "", encoding: str = "utf-8"
) -> Done:
    """Run the command line as a process of its own does.

    Args:
        arguments: what is typed.
        out, err: where the streams go: a path, "closed", or by default to be read.
        encoding: of the streams.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            code = RAISED
            try:
                sys.stdout = _stream(1, out, stdout.fileno(), encoding)
                sys.stderr = _stream(2, err, stderr.fileno(), encoding)
                sys.argv = ["intrafuse", *map(os.fsdecode, arguments)]
                code = _ended()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Done(code, *(os.pread(file.fileno(), 10**7, 0) for file in (stdout, stderr)))


def _stream(number: int, where: str, read: int, encoding: str) -> Any:
    """Open a standard stream as Python does when it starts."""
    if where == "closed":
        os.close(number)
        return None
    os.dup2(os.open(where, os.O_WRONLY) if where else read, number)
    errors = "strict" if number == 1 else "backslashreplace"
    return open(number, "w", encoding=encoding, errors=errors, buffering=1 if number == 2 else -1)


def _ended() -> int:
    """Give the exit code of main, with what Python does when it ends: it flushes the streams."""
    try:
        main()
        code = 0
    except SystemExit as error:
        assert error.code is None or isinstance(error.code, int)
        code = error.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    return code


def leftovers(folder: Path) -> Iterator[Path]:
    """List what dead writers left anywhere below a folder."""
    return folder.rglob(".*.tmp")
