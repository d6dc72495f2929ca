"""Kill a function at each of its file events, in forked processes that have everything imported."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

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


def leftovers(folder: Path) -> Iterator[Path]:
    """List what dead writers left anywhere below a folder."""
    return folder.rglob(".*.tmp")
