"""Costs: size, multiply-accumulates, memory and latency of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import OTHERS, Picture, faint, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables"]

PARTS = {
    "params": "parameters",
    "bytes": "bytes",
    "macs": "MACs",
    "peak": "peak memory",
    "latency": "latency",
}


def tables(record: Record) -> list[Table]:
    """List the networks; the first is the reference for the others."""
    columns = (
        *(Column("network"), Column("parameters", short), Column("bytes", short)),
        *(Column("MACs", short), Column("peak bytes", short)),
        *(Column.of(name, ".3f") for name in ("median ms", "lower quartile", "upper quartile")),
    )
    rows = []
    for row in record["rows"]:
        took = row["latency"]
        sizes = (row[name] for name in ("params", "bytes", "macs", "peak"))
        rows.append((row["network"], *sizes, took["median"], took["lower"], took["upper"]))
    return [Table(_title(record), columns, tuple(rows))]


def _title(record: Record) -> str:
    took = record["rows"][0]["latency"]
    threads = f"{took['threads']} thread{'s' * (took['threads'] != 1)}"
    inputs = ", ".join(" x ".join(map(str, shape)) for shape in record["inputs"])
    return f"One call with {inputs} on {took['device']}, {threads}, {took['runs']} warm runs"


def pictures(record: Record) -> list[Picture]:
    """Draw every cost as a share of the first network's cost."""
    first, *others = [{**row, "latency": row["latency"]["median"]} for row in record["rows"]]
    if not others:
        return []
    ratios = {
        row["network"]: {
            label: row[name] / first[name]
            for name, label in PARTS.items()
            if row[name] is not None and first[name]
        }
        for row in others
    }
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{label} {ratio:.0%}" for label, ratio in parts.items())
        for name, parts in ratios.items()
    )
    return [
        Picture(
            "cost",
            f"Costs as a share of the costs of {first['network']}",
            f"Of {first['network']}: {summary}.",
            lambda: _draw(ratios),
        )
    ]


def _draw(ratios: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, axes = new_figure(1.2 + 0.2 * len(ratios) * len(PARTS))
    height = 0.8 / len(ratios)
    labels = list(PARTS.values())
    for i, (name, parts) in enumerate(ratios.items()):
        places = [labels.index(label) + (i - (len(ratios) - 1) / 2) * height for label in parts]
        shade = OTHERS[i % len(OTHERS)][0]
        widths = [100 * ratio for ratio in parts.values()]
        drawn = axes.barh(places, widths, height=0.9 * height, color=shade, label=shortened(name))
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7)
    axes.axvline(100, color=faint(), linestyle="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("% of the first network")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
