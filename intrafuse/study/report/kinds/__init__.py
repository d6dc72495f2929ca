"""Every kind of record, with its tables and pictures.

To add a kind, write a file with two functions, ``tables(record) -> list[Table]`` and
``pictures(record) -> list[Picture]``, and enter it in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from intrafuse.study.report.kinds import (
    ablation,
    comparison,
    cost,
    divergence,
    factorized,
    fusion,
    landscape,
    pruning,
    sensitivity,
)
from intrafuse.study.report.pictures import Picture
from intrafuse.study.report.record import Record
from intrafuse.support.tables import Table

__all__ = ["KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """A kind of record: its title, and the functions that make its tables and pictures."""

    title: str
    tables: Callable[[Record], list[Table]]
    pictures: Callable[[Record], list[Picture]]

    @classmethod
    def of(cls, title: str, module: ModuleType) -> Kind:
        """Make a kind from the functions of a module."""
        return cls(title, module.tables, module.pictures)


KINDS = {
    "comparison": Kind.of("Comparison of methods", comparison),
    "divergence": Kind.of("Divergence of outputs", divergence),
    "landscape": Kind.of("Landscape", landscape),
    "sensitivity": Kind.of("Sensitivity of groups", sensitivity),
    "ablation": Kind.of("Ablation", ablation),
    "cost": Kind.of("Cost", cost),
    "fusion": Kind.of("Fused network", fusion),
    "factorized": Kind.of("Factorized training", factorized),
    "pruning": Kind.of("Pruned network", pruning),
}
"""All kinds, in the order of a page."""
