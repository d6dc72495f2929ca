"""intrafuse: make a trained neural network smaller without its data."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intrafuse.batchnorm import fold_batchnorm
    from intrafuse.budget import Budget, Figures
    from intrafuse.checkpoint import load, save
    from intrafuse.context import Context
    from intrafuse.errors import IntrafuseError
    from intrafuse.factorize import Factorized, Recipe, factorize
    from intrafuse.fuse import Fused, FusionReport, fuse
    from intrafuse.graph import ChannelGraph, ChannelGroup, trace
    from intrafuse.merge import MergeMap
    from intrafuse.moments.synthetic import synthesise
    from intrafuse.plan import Plan
    from intrafuse.prune import Pruned, Report, plan, prune
    from intrafuse.verification import Check, Verification, verify

__all__ = [
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "Check",
    "Context",
    "Factorized",
    "Figures",
    "Fused",
    "FusionReport",
    "IntrafuseError",
    "MergeMap",
    "Plan",
    "Pruned",
    "Recipe",
    "Report",
    "Verification",
    "factorize",
    "fold_batchnorm",
    "fuse",
    "load",
    "plan",
    "prune",
    "save",
    "synthesise",
    "trace",
    "verify",
]
__version__ = "0.1.0"

# PyTorch takes seconds to import, and `intrafuse --help` needs none of it: each public name is
# imported from its module when it is first asked for.
_HOMES = {
    "batchnorm": ("fold_batchnorm",),
    "budget": ("Budget", "Figures"),
    "checkpoint": ("load", "save"),
    "context": ("Context",),
    "errors": ("IntrafuseError",),
    "factorize": ("Factorized", "Recipe", "factorize"),
    "fuse": ("Fused", "FusionReport", "fuse"),
    "graph": ("ChannelGraph", "ChannelGroup", "trace"),
    "merge": ("MergeMap",),
    "moments.synthetic": ("synthesise",),
    "plan": ("Plan",),
    "prune": ("Pruned", "Report", "plan", "prune"),
    "verification": ("Check", "Verification", "verify"),
}
_MODULES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the modules plan.py and prune.py must not hide the functions of that name.
        if name in _MODULES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
