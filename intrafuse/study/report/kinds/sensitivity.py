"""Sensitivity: the points lost by pruning each group alone, as a map."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import Picture, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]

ROW = 0.19  # height of a group in inches


def tables(record: Record) -> list[Table]:
    """List accuracies by group and method, and mark each group as volatile or resilient.

    A group is volatile for a method that loses more points on it than on the average group.
    Otherwise it is resilient.
    """
    columns = (
        *(Column("group"), Column("method")),
        *(Column.of(f"{100 * share:g} %", ".2f") for share in record["shares"]),
        *(Column.of("points lost", ".2f"), Column("kind")),
    )
    average = {name: max(mean(lost.values()), 0) for name, lost in _lost(record).items()}
    rows = []
    for row in record["rows"]:
        lost = record["original"] - mean(row["accuracies"])
        kind = "volatile" if lost > average[row["method"]] else "resilient"
        rows.append((row["group"], row["method"], *row["accuracies"], lost, kind))
    title = f"Accuracy with one group pruned; unpruned {record['original']:.2f}"
    return [Table(title, columns, tuple(rows))]


def _lost(record: Record) -> dict[str, dict[str, float]]:
    """Average the points lost over the shares: {method: {group: points}}."""
    lost: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        points = record["original"] - mean(row["accuracies"])
        lost.setdefault(row["method"], {})[row["group"]] = points
    return lost


def pictures(record: Record) -> list[Picture]:
    """Draw a map of points lost for each method: groups by shares."""
    drawn = []
    for method, lost in _lost(record).items():
        rows = [row for row in record["rows"] if row["method"] == method]
        worst = sorted(lost.items(), key=lambda item: -item[1])
        summary = ", ".join(f"{group} {points:.2f}" for group, points in worst)
        drawn.append(
            Picture(
                f"sensitivity-{method}",
                f"Points of accuracy lost with one group pruned by {method}",
                f"Average points lost over the shares, most volatile group first: {summary}.",
                lambda rows=rows: _draw(record, rows),
            )
        )
    return drawn


def _draw(record: Record, rows: Sequence[Record]) -> Figure:
    figure, axes = new_figure(1.0 + ROW * len(rows))
    lost = [[record["original"] - percent for percent in row["accuracies"]] for row in rows]
    worst = max(record["original"] - p for row in record["rows"] for p in row["accuracies"])
    top = max(worst, 1.0)  # losses below one point stay pale
    drawn = axes.pcolormesh(lost, cmap="magma_r", vmin=0, vmax=top)
    for y, line in enumerate(lost):
        for x, points in enumerate(line):
            shade = "white" if points > top / 2 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 7, "color": shade}
            axes.text(x + 0.5, y + 0.5, f"{points:.1f}", **place)
    shares = [f"{100 * share:g}" for share in record["shares"]]
    axes.set_xticks([x + 0.5 for x in range(len(shares))], shares)
    names = [shortened(row["group"]) for row in rows]
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names, fontsize=7)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlabel("channels of the group removed (%)")
    figure.colorbar(drawn, ax=axes, label="points lost")
    return figure
