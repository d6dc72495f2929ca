"""Every kind of record, with the tables and the pictures that it gives.

A new kind is one file with two functions, ``tables(record) -> list[Table]`` and
``pictures(record) -> list[Picture]``, and an entry in KINDS.
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
    """What a kind of record is called on a page, and what it gives."""

    title: str
    tables: Callable[[Record], list[Table]]
    pictures: Callable[[Record], list[Picture]]

    @classmethod
    def of(cls, title: str, module: ModuleType) -> Kind:
        """Take the functions of a module."""
        return cls(title, module.tables, module.pictures)


KINDS = {
    "comparison": Kind.of("Comparison of methods", comparison),
    "divergence": Kind.of("Divergence of outputs", divergence),
    "landscape": Kind.of("Landscape", landscape),
    "sensitivity": Kind.of("Sensitivity of groups", sensitivity),
    "ablation": Kind.of("Ablation", ablation),
    "cost": Kind.of("Cost", cost),
    "fusion": Kind.of("Fused network", fusion),
    "factorized": Kind.of("Factorised training", factorized),
    "pruning": Kind.of("Pruned network", pruning),
}
"""In the order of a page."""
