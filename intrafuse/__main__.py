"""The entry point of the command line; handles interrupts even during imports."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]

INTERRUPTED = 130  # exit status of a command that an interrupt ends


def main() -> None:
    """Run the command line."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from intrafuse.cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python shuts down


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Exit at once during an import, which may swallow an exception or stop halfway."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        outer = outer.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()
