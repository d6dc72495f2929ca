"""Tables for the terminal, for text and for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from intrafuse.support.errors import printable

__all__ = ["Column", "Table", "make_table", "share", "short", "text_table"]

Show = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """A column: its name, and a function that formats its numbers (None for a text column)."""

    name: str
    show: Show | None = None

    @classmethod
    def of(cls, name: str, format: str) -> Column:
        """Make a column of numbers with a format specification.

        >>> Column.of("accuracy", ".2f").text(87.126)
        '87.13'
        """
        return cls(name, lambda value: f"{value:{format}}")

    def text(self, value: Any) -> str:
        """Format a value; None becomes an empty string."""
        if value is None:
            return ""
        return str(value) if self.show is None else self.show(value)


@dataclass(frozen=True)
class Table:
    """A table of values that can be shown in the terminal, as text or in the report."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        return [column.name for column in self.columns]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The positions of the columns that hold numbers."""
        return tuple(i for i, column in enumerate(self.columns) if column.show is not None)

    @property
    def texts(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


def short(number: int) -> str:
    """Write a number with three significant digits and a unit (k, M, G or T).

    >>> short(950), short(9_228_362), short(999_999), short(4_514_705_000)
    ('950', '9.23M', '1M', '4.51G')
    """
    for power, unit in enumerate(("", "k", "M", "G", "T")):
        text = f"{number / 1000**power:.3g}"
        if "e" not in text:  # 1e+03 belongs to the next unit
            return text + unit
    return str(number)


def share(number: float) -> str:
    """Write a share as a percentage.

    >>> share(0.305)
    '30.5%'
    """
    return f"{number:.1%}"


def make_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> RichTable:
    """Make a Rich table; `numbers` lists the right-aligned columns."""
    table = RichTable(title=_text(title, "table.title"), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(_text(name), justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(words: str, style: str = "") -> Text:
    """Make literal text: names may hold brackets (Rich markup) and control characters."""
    return Text(printable(words), style)


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
