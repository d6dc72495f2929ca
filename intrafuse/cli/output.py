"""What commands show: tables, JSON, notes, and progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from intrafuse.cli.options import Common

__all__ = ["Advance", "progress", "show_note", "show_table", "write_json"]

Advance = Callable[[str, int, int], None]


def show_table(
    common: Common,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
) -> None:
    """Print a table to standard output, or to standard error where JSON goes there."""
    from rich.console import Console

    from intrafuse.report.tables import make_table, text_table

    stream = sys.stderr if common.json == "-" else sys.stdout
    if stream.isatty():
        Console(file=stream).print(make_table(title, header, rows, numbers))
    else:
        typer.echo(text_table(title, header, rows, numbers), file=stream, nl=False)


def show_note(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(text, err=True)


def write_json(common: Common, data: Any) -> None:
    """Write the figures where --json says, a file as a whole or not at all."""
    if common.json is None:
        return
    text = json.dumps(data, indent=2, allow_nan=False)
    if common.json == "-":
        typer.echo(text)
        return
    from intrafuse.files import replacing

    with replacing(Path(common.json)) as temporary:
        temporary.write_text(text + "\n", "utf-8")


@contextmanager
def progress() -> Iterator[Advance]:
    """Yield a function (what, done, total) that moves bars on a terminal, and does nothing else.

    The bars are on standard error and vanish at the end.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield advance
