"""Conventional structured pruning: keep the most important channels, discard the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods.method import Method
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["Select", "most_important"]


def most_important(scores: Tensor, width: int) -> Tensor:
    """Return the ascending indices (width,) of the highest scores; ties keep the first."""
    order = scores.cpu().sort(descending=True, stable=True).indices
    return order[:width].sort().values


@dataclass(frozen=True)
class Select(Method):
    """Keep the channels with the highest importance (Li et al., ICLR 2017, arXiv 1608.08710).

    Choose it before long fine-tuning, and as the baseline of comparisons.
    """

    name: ClassVar[str] = "select"
    folds_batchnorm: ClassVar[bool] = False
    order: ClassVar[Literal["forward", "backward"]] = "backward"

    @property
    def independent(self) -> bool:
        """Scores alone decide."""
        return True

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        return MergeMap.select(group.name, len(scores), most_important(scores, width))
