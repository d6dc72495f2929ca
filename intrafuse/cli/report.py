"""`intrafuse report`: write one HTML page of all records; `plot`: write its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intrafuse.cli.options import Common
from intrafuse.cli.output import show_note, write_json
from intrafuse.support.errors import IntrafuseError

__all__ = ["plot", "report"]

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="Folders with records (--json) and saved networks."),
]


def report(
    paths: Paths,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; default: report.html in the first DIR."),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "intrafuse report",
    common: Common = Common(),
) -> None:
    """Write one self-contained HTML page from records, saved networks and factorized runs."""
    from intrafuse.study.report.page import write_report

    first = paths[0]
    target = out or (first if first.is_dir() else first.parent) / "report.html"
    written = write_report(paths, target, title=title)
    write_json(common, "report", {"report": str(written), "bytes": written.stat().st_size})
    show_note(f"report {written} ({written.stat().st_size / 1e6:.2f} MB)")


def plot(
    paths: Paths,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")],
    form: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    common: Common = Common(),
) -> None:
    """Write each picture of a report to a file."""
    from intrafuse.study.report.page import draw_pictures
    from intrafuse.study.report.pictures import FORMATS

    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise IntrafuseError(f"--format must be one of {known}", value=form, usage=True)
    written = draw_pictures(paths, out, form=form)
    write_json(common, "pictures", {"pictures": [str(path) for path in written]})
    show_note(f"{len(written)} pictures in {out}")
