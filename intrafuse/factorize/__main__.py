"""One worker of a factorised training: `python -m intrafuse.factorize FOLDER`."""

from __future__ import annotations

from intrafuse.factorize.worker import main

main()
