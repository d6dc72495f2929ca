"""Tables for the terminal and for text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["make_table", "text_table"]


def make_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> Table:
    """Make a Rich table; `numbers` lists the columns that are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: names may hold brackets
    return table


def text_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Draw a table as plain text of at most 120 columns.

    >>> print(text_table("Two", ["name", "n"], [["a", "1"]], numbers=[1]).splitlines()[0].strip())
    Two
    """
    console = Console(file=StringIO(), width=120, color_system=None)
    console.print(make_table(title, header, rows, numbers))
    return console.file.getvalue()  # type: ignore[attr-defined]
