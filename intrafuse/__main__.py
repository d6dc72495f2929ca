"""The entry point of the command line, ready for an interrupt before anything is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]

INTERRUPTED = 130  # what shells say of a command that an interrupt ended


def main() -> None:
    """Run the command line."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from intrafuse.cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python has no more to say at its end


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Leave at once while something is imported, which may swallow an exception or end halfway."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        outer = outer.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()
