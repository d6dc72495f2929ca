"""`intrafuse demo`: train on the embedded digits, prune, compare, save and reload."""

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
        found = run_demo(out, seed=common.seed, device=common.device, progress=advance)
    record = {
        **found.comparison.as_data(),
        "saved": [str(folder) for folder in found.folders],
        "reloaded": str(found.reloaded),
        "identical": found.identical,
        "report": None if found.report is None else str(found.report),
    }
    show_record(common, "comparison", record, "digits_resnet on digits, before fine-tuning")
    show_note(f"saved {len(found.folders)} networks in {out}")
    if not found.identical:
        raise IntrafuseError("a reloaded network must give the same outputs", value=str(out))
    show_note(f"{found.reloaded}: the outputs of the reloaded network agree bit for bit")
    missing = "none: pip install 'intrafuse[plots]' draws it"
    show_note(f"report {found.report or missing}")
