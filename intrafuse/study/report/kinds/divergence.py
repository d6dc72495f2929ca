"""Divergences: histograms of output distances, and errors along the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from intrafuse.study.report.pictures import Picture, colour, ink, marker, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]

LEAST = 1e-3  # smallest error in a picture
NAMES = 34  # most layer names on an axis
MEASURES = {
    "logits": "L2 distance of logits from the original's",
    "softmax": "L2 distance of probabilities from the original's",
    "cosine": "1 - cosine of the logits and the original's",
}


def tables(record: Record) -> list[Table]:
    """List means and quartiles by amount and method, and the layers if they were measured."""
    numbers = [
        Column.of(name, ".4f") for name in ("mean", "lower quartile", "median", "upper quartile")
    ]
    columns = (Column("method"), Column("channels removed", share), *numbers)
    rows = [
        (row["method"], row["channels_removed"], row["mean"], *row["quartiles"])
        for row in record["rows"]
    ]
    found = [Table(MEASURES[record["measure"]], columns, tuple(rows))]
    if any(row["layers"] for row in record["rows"]):
        found.append(_layers(record))
    return found


def _layers(record: Record) -> Table:
    columns = (
        *(Column("layer"), Column("method"), Column("channels removed", share)),
        *(Column.of("error", ".4f"), Column.of("variance ratio", ".4f")),
    )
    rows = [
        (
            *(layer["layer"], row["method"], row["channels_removed"]),
            *(layer["error"], layer["variance_ratio"]),
        )
        for row in record["rows"]
        for layer in row["layers"]
    ]
    return Table("Layer by layer, from input to output", columns, tuple(rows))


def pictures(record: Record) -> list[Picture]:
    """Draw a histogram for each amount, and errors and variances along the layers."""
    found = []
    shares = sorted({_percent(row) for row in record["rows"]})
    for percent in shares:
        rows = [row for row in record["rows"] if _percent(row) == percent]
        means = ", ".join(f"{row['method']} {row['mean']:.4f}" for row in rows)
        found.append(
            Picture(
                f"divergence-{percent}",
                f"{MEASURES[record['measure']]}, {percent} % of the channels removed",
                f"Histograms over {record['images']:,} images; the last bar holds all larger "
                f"values; means (dashed): {means}.",
                lambda rows=rows: _histogram(rows, MEASURES[record["measure"]]),
            )
        )
        if any(row["layers"] for row in rows):
            found.append(_along(rows, percent))
    return found


def _percent(row: Record) -> int:
    return round(100 * row["channels_removed"])


def _histogram(rows: Sequence[Record], label: str) -> Figure:
    figure, axes = new_figure()
    for i, row in enumerate(rows):
        shade, edges = colour(row["method"], i), row["edges"]
        # the last bin holds all larger values: draw it as wide as the other bins
        bounds = [*edges[:-1], 2 * edges[-2] - edges[-3]]
        axes.stairs(row["counts"], bounds, color=shade, fill=True, alpha=0.25)
        axes.stairs(row["counts"], bounds, color=shade, label=row["method"])
        axes.axvline(row["mean"], color=shade, linestyle="--", linewidth=1)
    axes.set_xlabel(label)
    axes.set_ylabel("images")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _along(rows: Sequence[Record], percent: int) -> Picture:
    summary = "; ".join(
        f"{row['method']}: first {row['layers'][0]['error']:.3f}, "
        f"last {row['layers'][-1]['error']:.3f} (variance ratio "
        f"{row['layers'][-1]['variance_ratio']:.3f})"
        for row in rows
        if row["layers"]
    )
    return Picture(
        f"layers-{percent}",
        f"Error along the layers, {percent} % of the channels removed",
        f"Squared error of the layers' outputs divided by their variance, from input to output; "
        f"errors below {LEAST} are drawn at {LEAST}. {summary}.",
        lambda: _draw_layers(rows),
    )


def _draw_layers(rows: Sequence[Record]) -> Figure:
    figure, axes = new_figure(3.8)
    for i, row in enumerate(rows):
        how: dict[str, Any] = {
            "color": colour(row["method"], i),
            "marker": marker(row["method"], i),
        }
        places = range(len(row["layers"]))
        errors = [max(layer["error"], LEAST) for layer in row["layers"]]
        ratios = [layer["variance_ratio"] for layer in row["layers"]]
        axes.plot(places, errors, markersize=3, label=row["method"], **how)
        axes.plot(places, ratios, markersize=3, linestyle=":", **how)
    axes.axhline(1, color=ink(), linewidth=0.6)
    names = [shortened(layer["layer"]) for layer in rows[0]["layers"]]
    every = -(-len(names) // NAMES)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7)
    axes.set_ylabel("error (solid), variance ratio (dotted)")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
