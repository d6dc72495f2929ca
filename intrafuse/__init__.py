"""intrafuse: make a trained neural network smaller without its data."""

from intrafuse.batchnorm import fold_batchnorm
from intrafuse.budget import Budget, Figures
from intrafuse.context import Context
from intrafuse.errors import IntrafuseError
from intrafuse.graph import ChannelGraph, ChannelGroup, trace
from intrafuse.merge import MergeMap
from intrafuse.plan import Plan
from intrafuse.prune import Pruned, Report, plan, prune

__all__ = [
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "Context",
    "Figures",
    "IntrafuseError",
    "MergeMap",
    "Plan",
    "Pruned",
    "Report",
    "fold_batchnorm",
    "plan",
    "prune",
    "trace",
]
__version__ = "0.1.0"
