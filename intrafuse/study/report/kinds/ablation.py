"""An ablation: accuracies with several settings, and a test of whether they differ."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from intrafuse.study.report.pictures import OTHERS, Picture, ink, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]


def tables(record: Record) -> list[Table]:
    """List the settings and the test."""
    columns = (
        *(Column("setting"), Column.of("networks", "d")),
        *(Column.of(name, ".2f") for name in ("mean accuracy", "median", "lowest")),
    )
    rows = [
        (name, len(values), mean(values), median(values), min(values))
        for name, values in record["accuracies"].items()
    ]
    numbers = (Column.of("H", ".3f"), Column.of("p", ".3f"))
    test = ((record["statistic"], record["p_value"]),)
    return [
        Table("Accuracy with one group pruned, by setting", columns, tuple(rows)),
        Table("Kruskal-Wallis test: do the settings differ?", numbers, test),
    ]


def pictures(record: Record) -> list[Picture]:
    """Draw the accuracies with each setting as boxes."""
    summary = ", ".join(f"{n} {median(v):.2f}" for n, v in record["accuracies"].items())
    return [
        Picture(
            "ablation",
            f"Accuracy with {len(record['accuracies'])} settings",
            f"Boxes of accuracy in percent; medians: {summary}. Kruskal-Wallis: "
            f"H = {record['statistic']:.3f}, p = {record['p_value']:.3f}.",
            lambda: _draw(record["accuracies"]),
        )
    ]


def _draw(accuracies: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure(1.0 + 0.3 * len(accuracies))
    parts = ("boxprops", "medianprops", "whiskerprops", "capprops")
    lines: dict[str, Any] = {name: {"color": ink()} for name in parts}  # matplotlib changes each
    drawn = axes.boxplot(
        list(accuracies.values()),
        orientation="horizontal",
        tick_labels=[shortened(name) for name in accuracies],
        patch_artist=True,
        **lines,
        flierprops={"marker": ".", "markeredgecolor": ink(), "markersize": 3},
    )
    for box in drawn["boxes"]:
        box.set_facecolor(OTHERS[3][0])
        box.set_alpha(0.6)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    return figure
