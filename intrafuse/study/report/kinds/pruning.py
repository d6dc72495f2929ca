"""A pruning: every group's width before and after, as a table and as a picture of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intrafuse.study.report.pictures import Picture, colour, faint, new_figure, shortened
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Column, Table, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "sizes", "tables"]

SIZES = {"channels": "channels", "params": "parameters", "macs": "MACs"}
ROW = 0.19  # height of a group in inches
MOST = 120  # most groups in a picture


def tables(record: Record) -> list[Table]:
    """List sizes and accuracy before and after, and the groups."""
    return [sizes(record), _groups(record)]


def sizes(record: Record) -> Table:
    """List counted and measured figures before and after."""
    rows: list[tuple[Any, ...]] = [
        (name, record["before"][kind], record["after"][kind], record["removed"][kind])
        for kind, name in SIZES.items()
    ]
    took = record.get("latency")
    if took:
        before, after = (took[name]["median"] for name in ("before", "after"))
        rows.append(("latency (ms)", before, after, 1 - after / before))
    figures = record.get("figures", {})
    if figures.get("accuracy") is not None:
        rows.append(("accuracy", figures.get("accuracy_before"), figures["accuracy"], None))
    columns = (Column(""), Column("before", _number), Column("after", _number))
    return Table("Size", (*columns, Column("removed", share)), tuple(rows))


def _number(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def _groups(record: Record) -> Table:
    columns = (
        *(Column.of("index", "d"), Column("group"), Column.of("before", ",d")),
        *(Column.of("after", ",d"), Column("removed", share)),
        *(Column("written by"), Column("read by")),
    )
    rows = []
    for name, group in record["widths"].items():
        gone = 1 - group["after"] / group["before"]
        layers = (", ".join(group[key]) for key in ("written_by", "read_by"))
        rows.append((group["index"], name, group["before"], group["after"], gone, *layers))
    chosen = {name: note.get("chosen", "") for name, note in record.get("notes", {}).items()}
    if chosen:
        columns += (Column("chosen"),)
        rows = [(*row, chosen.get(row[1], "")) for row in rows]
    return Table("Groups of channels", columns, tuple(sorted(rows)))


def pictures(record: Record) -> list[Picture]:
    """Draw the network from input to output, with the width of each group before and after."""
    groups = sorted(record["widths"].items(), key=lambda item: -item[1]["index"])
    summary = "; ".join(f"{name} {g['before']} to {g['after']}" for name, g in groups[:MOST])
    more = len(groups) - MOST
    method = record["method"]["name"]
    return [
        Picture(
            "widths",
            "The network from input to output: channels of each group before and after",
            f"Channels before and after, from input to output: {summary}"
            + (f"; and {more} more groups." if more > 0 else "."),
            lambda: _draw(groups[:MOST], method),
        )
    ]


def _draw(groups: Sequence[tuple[str, Mapping[str, Any]]], method: str) -> Figure:
    figure, axes = new_figure(0.9 + ROW * len(groups))
    rows = range(len(groups))
    widest = max((group["before"] for _, group in groups), default=1)
    for key, shade in (("before", faint()), ("after", colour(method))):
        widths = [group[key] for _, group in groups]
        # centered, to resemble the network
        axes.barh(rows, widths, left=[-w / 2 for w in widths], color=shade, label=key, height=0.8)
    for row, (_, group) in enumerate(groups):
        text = f"{group['before']:,} → {group['after']:,}"
        axes.annotate(text, (0.53 * widest, row), va="center", fontsize=7)
    axes.set_yticks(rows, [shortened(name) for name, _ in groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(-0.52 * widest, 0.85 * widest)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.grid(False)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
