"""A comparison: accuracy against the removed share, by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import Picture, colour, marker, new_figure
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table, share, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]

COLUMNS = (
    Column("method"),
    Column("channels removed", share),
    Column("parameters", short),
    Column("removed", share),
    Column("MACs", short),
    Column("removed", share),
    Column.of("accuracy", ".2f"),
    Column.of("seconds", ".2f"),
)
FIELDS = (
    *("method", "channels_removed", "params", "params_removed"),
    *("macs", "macs_removed", "accuracy", "seconds"),
)


def tables(record: Record) -> list[Table]:
    """List the networks: the unpruned one, and one for each amount and method."""
    before = record["original"]
    first = ("unpruned", None, before["params"], None, before["macs"], None, before["accuracy"])
    rows = [(*first, None), *(tuple(row[name] for name in FIELDS) for row in record["rows"])]
    return [Table("Accuracy by method and amount", COLUMNS, tuple(rows))]


def pictures(record: Record) -> list[Picture]:
    """Draw accuracy against the removed share of channels."""
    lines = _lines(record)
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{y:.2f} at {x:.0f} %" for x, y in points)
        for name, points in lines.items()
    )
    return [
        Picture(
            "accuracy",
            "Accuracy against the share of channels removed, without fine-tuning",
            f"Accuracy in percent by channels removed. {summary}.",
            lambda: _draw(lines),
        )
    ]


def _lines(record: Record) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in record["rows"]:
        point = (100 * row["channels_removed"], row["accuracy"])
        lines.setdefault(row["method"], []).append(point)
    start = (0.0, record["original"]["accuracy"])
    return {name: [start, *sorted(points)] for name, points in lines.items()}


def _draw(lines: Mapping[str, list[tuple[float, float]]]) -> Figure:
    figure, axes = new_figure()
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour(name, i), marker=marker(name, i), markersize=4, label=name)
    axes.set_xlabel("channels removed (%)")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure
