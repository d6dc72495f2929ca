"""What `prune` returns: the network, its plan, and a report of requested and achieved sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from intrafuse.allocation.budget import KINDS, Figures
from intrafuse.allocation.timing import Latency
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.verification.proof import Check
from intrafuse.support.tables import text_table

__all__ = ["Pruned", "Report"]


@dataclass(frozen=True)
class Report:
    """Requested and achieved sizes.

    Attributes:
        wanted: the budget: {kind: share to remove}, in [0, 1].
        reached: removed shares of channels, params and macs, in [0, 1].
        before, after: channels, parameters and MACs of the network.
        seconds: time for tracing, planning, surgery and any repair, without the check.
        latency: of one call, measured "before" and "after"; empty without a latency budget.
        notes: the method's notes on its choices, by group name. `auto` notes the "chosen"
            candidate and the "predicted" error of each.
        check: result of the check, with its own seconds; None if the check was off.
        unclear: numbers that modules hold, as "module.name". No traced code reads them, and each
            may stand for several axes that had one size and now differ, so they stay unchanged.
    """

    wanted: Mapping[str, float]
    reached: Mapping[str, float]
    before: Figures
    after: Figures
    seconds: float
    latency: Mapping[str, Latency] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Check | None = None
    unclear: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            [
                kind,
                f"{getattr(self.before, kind):,}",
                f"{getattr(self.after, kind):,}",
                f"{self.reached[kind]:.1%}",
                f"{self.wanted[kind]:.1%}" if kind in self.wanted else "",
            ]
            for kind in KINDS
        ]
        if self.latency:
            before, after = (self.latency[name].median for name in ("before", "after"))
            milliseconds = ["latency (ms)", f"{before:.3f}", f"{after:.3f}"]
            rows.append(
                [*milliseconds, f"{1 - after / before:.1%}", f"{self.wanted['latency']:.1%}"]
            )
        header = ["", "before", "after", "removed", "wanted"]
        table = text_table(f"Pruned in {self.seconds:.2f} s", header, rows, numbers=(1, 2, 3, 4))
        header, rows = self.choices()
        table += text_table("Choices", header, rows, numbers=(2,)) if rows else ""
        return "\n".join([table.rstrip("\n"), *self.remarks()])

    def remarks(self) -> list[str]:
        """Return lines on how the network was checked, and on numbers that were not followed."""
        lines = [] if self.check is None else [str(self.check)]
        if self.unclear:
            shown = ", ".join(self.unclear[:6]) + (", ..." if len(self.unclear) > 6 else "")
            lines.append(f"Unchanged, because they may stand for several sizes: {shown}")
        return lines

    def choices(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: the choice for each group, and the best other candidate."""
        rows = []
        for group, note in self.notes.items():
            errors = dict(note.get("predicted", {}))
            chosen = note.get("chosen", "")
            own = errors.pop(chosen, None)
            other = min(errors, key=errors.__getitem__, default=None)
            next_best = "" if other is None else f"{other} ({errors[other]:.4f})"
            rows.append([group, chosen, "" if own is None else f"{own:.4f}", next_best])
        return ["group", "chosen", "predicted error", "best of the others"], rows


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network with the plan that made it and a report."""

    model: nn.Module
    plan: Plan
    report: Report
