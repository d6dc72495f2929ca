"""`intrafuse demo`: train on the included digits, prune, compare, save and reload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intrafuse.cli.options import Common
from intrafuse.cli.output import progress, show_note, show_record
from intrafuse.support.errors import IntrafuseError

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to save the networks in.")
    ] = Path("runs/demo"),
    common: Common = Common(),
) -> None:
    """Train a network on the embedded digits, prune it, and show what is left: half a minute."""
    common.start()
    from intrafuse.study.demo import run_demo

    with progress() as advance:
        demo_run = run_demo(out, seed=common.seed, device=common.device, progress=advance)
    record = {
        **demo_run.comparison.as_data(),
        "saved": [str(folder) for folder in demo_run.folders],
        "reloaded": str(demo_run.reloaded),
        "identical": demo_run.identical,
        "report": None if demo_run.report is None else str(demo_run.report),
    }
    show_record(common, "comparison", record, "digits_resnet on digits, before fine-tuning")
    show_note(f"saved {len(demo_run.folders)} networks in {out}")
    if not demo_run.identical:
        raise IntrafuseError("a reloaded network must return the same outputs", value=str(out))
    show_note(f"{demo_run.reloaded}: the outputs of the reloaded network agree bit for bit")
    missing = "missing: pip install 'intrafuse[plots]' enables it"
    show_note(f"report {demo_run.report or missing}")
