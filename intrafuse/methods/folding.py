"""Folding: cluster channels and replace each cluster by its mean (placeholder until built)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from intrafuse.context import Context
from intrafuse.graph.groups import ChannelGroup
from intrafuse.merge import MergeMap

__all__ = ["Folding"]


@dataclass(frozen=True, kw_only=True)
class Folding:
    name: ClassVar[str] = "folding"
    folds_batchnorm: ClassVar[bool] = True

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        raise NotImplementedError
