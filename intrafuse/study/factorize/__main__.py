"""Run one worker of a factorized training: `python -m intrafuse.study.factorize FOLDER`."""

from __future__ import annotations

from intrafuse.study.factorize.worker import main

main()
