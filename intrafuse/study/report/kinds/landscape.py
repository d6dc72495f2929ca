"""A landscape: values on the plane through three networks, with contours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import Picture, ink, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]

LEVELS = 12  # number of contour levels


def tables(record: Record) -> list[Table]:
    """List the three networks with their values and places."""
    columns = (
        *(Column("network"), Column.of(record["measure"], ".2f")),
        *(Column.of("x", ".2f"), Column.of("y", ".2f")),
    )
    rows = [(a["name"], a["value"], a["x"], a["y"]) for a in record["anchors"]]
    return [Table("The three networks", columns, tuple(rows))]


def pictures(record: Record) -> list[Picture]:
    """Draw the plane."""
    summary = ", ".join(f"{a['name']} {a['value']:.2f}" for a in record["anchors"])
    values = [value for row in record["values"] for value in row]
    removed = record.get("channels_removed")
    amount = "" if removed is None else f", {removed:.0%} of the channels removed"
    return [
        Picture(
            "landscape",
            f"{record['measure'].capitalize()} on the plane through the three networks{amount}",
            f"Contours on a grid of {len(record['x'])} x {len(record['y'])} points, from "
            f"{min(values):.2f} to {max(values):.2f}. At the networks: {summary}.",
            lambda: _draw(record),
        )
    ]


def _draw(record: Record) -> Figure:
    figure, axes = new_figure(3.6)
    values = record["values"]
    low, high = min(map(min, values)), max(map(max, values))
    steps = [low + (high - low or 1) * i / LEVELS for i in range(LEVELS + 1)]
    drawn = axes.contourf(record["x"], record["y"], values, levels=steps, cmap="viridis")
    lines = axes.contour(
        record["x"], record["y"], values, levels=steps, colors="white", linewidths=0.3
    )
    lines.set_alpha(0.6)
    figure.colorbar(drawn, ax=axes, label=record["measure"], format="%.3g")
    for anchor, mark in zip(record["anchors"], "os^", strict=True):
        label = f"{shortened(anchor['name'], 16)} {anchor['value']:.1f}"
        axes.plot(
            anchor["x"], anchor["y"], mark, color="white", mec="black", mew=1, ms=8, label=label
        )
    axes.set_xlabel("distance from the original")
    axes.grid(False)
    figure.legend(loc="outside upper center", ncols=3, labelcolor=ink(), fontsize=8)
    return figure
