"""intrafuse: make a trained neural network smaller without its data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from intrafuse.support.version import __version__

if TYPE_CHECKING:
    from intrafuse.allocation.budget import Budget, Figures
    from intrafuse.checkpoint.folder import load, save
    from intrafuse.checkpoint.stream import Streamed, prune_checkpoint
    from intrafuse.fusing.fuse import Fused, FusionReport, fuse
    from intrafuse.graph import ChannelGraph, ChannelGroup, trace
    from intrafuse.moments.synthetic import synthesise
    from intrafuse.pruning.plan import Plan
    from intrafuse.pruning.prune import plan, prune
    from intrafuse.pruning.result import Pruned, Report
    from intrafuse.pruning.settings import Settings
    from intrafuse.pruning.verification import Check, Verification, verify
    from intrafuse.study.factorize import Factorized, Recipe, factorize
    from intrafuse.support.errors import IntrafuseError
    from intrafuse.surgery.batchnorm import fold_batchnorm
    from intrafuse.surgery.context import Context
    from intrafuse.surgery.merge_map import MergeMap

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
    "Settings",
    "Streamed",
    "Verification",
    "__version__",
    "factorize",
    "fold_batchnorm",
    "fuse",
    "load",
    "plan",
    "prune",
    "prune_checkpoint",
    "save",
    "synthesise",
    "trace",
    "verify",
]

# PyTorch takes seconds to import, and `intrafuse --help` does not need it. So each public name is
# imported from its module on first use.
_HOMES = {
    "checkpoint.folder": ("load", "save"),
    "checkpoint.stream": ("Streamed", "prune_checkpoint"),
    "fusing.fuse": ("Fused", "FusionReport", "fuse"),
    "allocation.budget": ("Budget", "Figures"),
    "graph": ("ChannelGraph", "ChannelGroup", "trace"),
    "moments.synthetic": ("synthesise",),
    "pruning.plan": ("Plan",),
    "pruning.prune": ("plan", "prune"),
    "pruning.result": ("Pruned", "Report"),
    "pruning.settings": ("Settings",),
    "pruning.verification": ("Check", "Verification", "verify"),
    "study.factorize": ("Factorized", "Recipe", "factorize"),
    "support.errors": ("IntrafuseError",),
    "surgery.batchnorm": ("fold_batchnorm",),
    "surgery.context": ("Context",),
    "surgery.merge_map": ("MergeMap",),
}
_MODULES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
