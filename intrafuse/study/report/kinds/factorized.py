"""A factorized training: its stages, and their times on each worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from intrafuse.study.report.pictures import Picture, new_figure
from intrafuse.study.report.record import Record
from intrafuse.support.extras import import_extra
from intrafuse.support.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pictures", "tables", "timeline"]

COLOURS = {"trained": "#4477aa", "pruned": "#ee9944", "fused": "#228833", "tuned": "#66ccee"}
Row = tuple[str, list[tuple[float, Record]]]


def tables(record: Record) -> list[Table]:
    """List the stages."""
    columns = (
        *(Column("stage"), Column("part"), Column.of("images", ",d"), Column.of("epochs", "d")),
        *(Column.of("seconds", ".1f"), Column.of("parameters", ",d")),
        *(Column.of("before", ".2f"), Column.of("accuracy", ".2f")),
    )
    rows = [
        (
            *(r["name"], str(r["part"] or "all"), r["images"], r["epochs"]),
            *(r["seconds"], r["params"], r["before"], r["accuracy"]),
        )
        for r in record["records"]
    ]
    title = f"{record['scheme']}: {record['seconds']:.1f} s"
    if record["workers"] is not None:
        title += f", {record['received']:,} bytes from the workers"
    return [Table(title, columns, tuple(rows))]


def pictures(record: Record) -> list[Picture]:
    """Draw the stages on a time axis."""
    return [timeline({record["scheme"]: record})]


def timeline(records: Mapping[str, Record]) -> Picture:
    """Draw the stages of runs, with one row for each worker and one for the joint stages.

    Times assume one machine for each part: parts start together, joint stages follow the slowest
    part, and pauses of stopped runs are left out.

    Args:
        records: records of runs, by the name that labels their rows.
    """
    summary = "; ".join(
        f"{name} {record['seconds']:.1f} s in total: "
        + ", ".join(f"{_where(r)} {r['name']} {r['seconds']:.1f} s" for r in record["records"])
        for name, record in records.items()
    )
    return Picture(
        "timeline",
        "Stages over time, with one machine for each part",
        f"{summary}.",
        lambda: _draw(records),
    )


def _where(stage: Record) -> str:
    return f"part {stage['part']}" if stage["part"] else "all data"


def _draw(records: Mapping[str, Record]) -> Figure:
    rows = [row for name, record in records.items() for row in _rows(name, record["records"])]
    figure, axes = new_figure(1.1 + 0.3 * len(rows))
    for height, (_, bars) in enumerate(rows):
        for start, stage in bars:
            shade = COLOURS[_kind(stage)]
            axes.barh(height, stage["seconds"], left=start, height=0.7, color=shade)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    shown = {_kind(stage) for record in records.values() for stage in record["records"]}
    patch = import_extra("matplotlib.patches", "plots").Patch
    handles = [patch(color=c, label=kind) for kind, c in COLOURS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _kind(stage: Record) -> str:
    return stage["name"].partition("-")[0]


def _rows(name: str, stages: Sequence[Record]) -> list[Row]:
    """Place every stage on the time axis: parts in parallel, joint stages after them."""
    parts = sorted({stage["part"] for stage in stages if stage["part"]})
    rows = [(f"{name}, part {part}", _placed(stages, part, 0.0)) for part in parts]
    ends = [sum(stage["seconds"] for _, stage in bars) for _, bars in rows]
    return [*rows, (f"{name}, all data", _placed(stages, 0, max(ends, default=0.0)))]


def _placed(stages: Sequence[Record], part: int, start: float) -> list[tuple[float, Record]]:
    found = []
    for stage in stages:
        if stage["part"] == part:
            found.append((start, stage))
            start += stage["seconds"]
    return found
