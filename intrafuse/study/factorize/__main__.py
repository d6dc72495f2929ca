"""One worker of a factorised training: `python -m intrafuse.study.factorize FOLDER`."""

from __future__ import annotations

from intrafuse.study.factorize.worker import main

main()
