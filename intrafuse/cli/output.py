"""Output of commands: tables, JSON, notes, and progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from intrafuse.cli.options import COMMAND, Common, show_note
from intrafuse.support.errors import printable

__all__ = ["Advance", "progress", "show_note", "show_record", "show_table", "write_json"]

Advance = Callable[[str, int, int], None]


def show_table(
    common: Common,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
) -> None:
    """Print a table to standard output, or to standard error if JSON goes to standard output."""
    from rich.console import Console

    from intrafuse.support.tables import make_table, text_table

    stream = sys.stderr if common.json == "-" else sys.stdout
    if stream.isatty():
        Console(file=stream).print(make_table(title, header, rows, numbers))
        return
    text = text_table(title, header, rows, numbers).removesuffix("\n")
    show_note(text) if stream is sys.stderr else typer.echo(text)


def show_record(common: Common, kind: str, data: Mapping[str, Any], title: str = "") -> None:
    """Write a record to the file of --json, and print its tables.

    Args:
        common: the options of all commands.
        kind: kind of the record.
        data: figures of the record.
        title: prefix of the tables' titles.
    """
    from intrafuse.study.report.kinds import KINDS

    write_json(common, kind, data)
    for table in KINDS[kind].tables(data):
        name = f"{title}: {table.title}" if title else table.title
        show_table(common, name, table.header, table.texts, table.numbers)


def write_json(common: Common, kind: str, data: Mapping[str, Any]) -> None:
    """Write the record of a command to the file of --json, atomically."""
    if common.json is None:
        return
    from intrafuse.study.report.record import as_record, write_record

    record = as_record(kind, data, command=COMMAND.get())
    if common.json == "-":
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
    else:
        write_record(Path(common.json), record)


@contextmanager
def progress() -> Iterator[Advance]:
    """Yield a function (what, done, total) that moves progress bars, if there is a terminal.

    The bars are on standard error and disappear at the end.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(printable(what)))
            bars.update(tasks[what], completed=done, total=total)

        yield advance
