"""A picture of a factorised training: who worked at what, and when."""

from __future__ import annotations

from pathlib import Path

from intrafuse.data import import_extra
from intrafuse.factorize.result import Result
from intrafuse.factorize.stages import Record
from intrafuse.files import replacing

__all__ = ["draw_timeline"]

COLOURS = {"trained": "#4477aa", "pruned": "#ee9944", "fused": "#228833", "tuned": "#66ccee"}


def draw_timeline(results: dict[str, Result], path: Path) -> Path:
    """Draw the stages of some runs, one row for each worker and one for the joint stages.

    Time is that with one machine for each part: parts start together, joint stages follow the
    slowest, and pauses of a run that was stopped are cut out.

    Args:
        results: by the name that stands beside the rows.
        path: of the picture; its ending says the format, .png or .svg.

    Returns:
        The path.

    Raises:
        IntrafuseError: matplotlib is not installed, or the file cannot be written.
    """
    figure_module = import_extra("matplotlib.figure", "plots")
    rows = [row for name, result in results.items() for row in _rows(name, result)]
    figure = figure_module.Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for height, (_, bars) in enumerate(rows):
        for start, record in bars:
            kind = record.name.partition("-")[0]
            axes.barh(height, record.seconds, left=start, height=0.7, color=COLOURS[kind])
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    shown = {r.name.partition("-")[0] for result in results.values() for r in result.records}
    patch = import_extra("matplotlib.patches", "plots").Patch
    handles = [patch(color=c, label=kind) for kind, c in COLOURS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".") or "png")
    return path


def _rows(name: str, result: Result) -> list[tuple[str, list[tuple[float, Record]]]]:
    """Place every stage on the axis of time: parts side by side, joint stages behind them."""
    rows = []
    for part in result.parts:
        rows.append((f"{name}, part {part}", _placed(result, part, 0.0)))
    after = max(result.parts.values(), default=0.0)
    return [*rows, (f"{name}, all data", _placed(result, 0, after))]


def _placed(result: Result, part: int, start: float) -> list[tuple[float, Record]]:
    found = []
    for record in result.records:
        if record.part == part:
            found.append((start, record))
            start += record.seconds
    return found
