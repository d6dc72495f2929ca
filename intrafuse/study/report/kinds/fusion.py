"""A fusion: the original networks and the fused network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import OTHERS, Picture, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]


def tables(record: Record) -> list[Table]:
    """List the networks with their weights, sizes and accuracies."""
    accuracies = [*record["figures"].get("accuracy_of_networks", ())]
    accuracies += [None] * (len(record["networks"]) - len(accuracies))
    rows = [*zip(record["networks"], record["weights"], record["sizes"], accuracies, strict=True)]
    rows.append(("fused", None, record["params"], record["figures"].get("accuracy")))
    columns = (
        *(Column("network"), Column.of("weight", ".3f"), Column.of("parameters", ",d")),
        Column.of("accuracy", ".2f"),
    )
    if record["figures"].get("accuracy") is None:
        columns, rows = columns[:3], [row[:3] for row in rows]
    title = f"Fused by {record['method']} in {record['seconds']:.2f} s"
    return [Table(title, columns, tuple(rows))]


def pictures(record: Record) -> list[Picture]:
    """Draw the accuracies if they were measured."""
    figures = record["figures"]
    if figures.get("accuracy") is None:
        return []
    bars = [*zip(record["networks"], figures["accuracy_of_networks"], strict=True)]
    bars.append(("fused", figures["accuracy"]))
    summary = ", ".join(f"{name} {percent:.2f}" for name, percent in bars)
    return [Picture("fusion", "Accuracy before and after", f"{summary}.", lambda: _draw(bars))]


def _draw(bars: Sequence[tuple[str, float]]) -> Figure:
    figure, axes = new_figure(0.9 + 0.28 * len(bars))
    shades = [OTHERS[1][0]] * (len(bars) - 1) + [OTHERS[3][0]]
    drawn = axes.barh(range(len(bars)), [percent for _, percent in bars], color=shades)
    axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(bars)), [shortened(name) for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    return figure
