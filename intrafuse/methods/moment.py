"""Moment matching: every reader re-solves for itself how to read the old activations from the new.

See `intrafuse.moments.readout` for the mathematics of the readout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from intrafuse.context import Context
from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.rules.products import SUMMED
from intrafuse.merge import MergeMap
from intrafuse.methods.folding import Folding, restored_variance
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.select import Select, most_important
from intrafuse.methods.settings import check_choices
from intrafuse.moments.explain import explaining_channels
from intrafuse.moments.readout import with_readout
from intrafuse.moments.sources import MomentSource, Source

__all__ = ["Moment"]

Transport = Literal["none", "intra-fusion", "folding"]
Choice = Literal["greedy", "importance"]


@dataclass(frozen=True, kw_only=True)
class Moment(MomentSource):
    """Match moments: keep or merge channels, then re-solve each reader (ours; DESIGN section 6).

    No data is needed where a normalisation layer stands before the activation: mean and spread
    come from the norm, correlations from the weights. Without one, inputs of unit variance are
    assumed and propagated.

    Of attention, whole heads are selected with their queries and keys, and the output projection
    reads the values of the lost ones from those of the kept. The width of queries and keys is
    selected by importance, as `select` does: its reader sees the values alone, and one readout for
    the same width of all heads fits none of them (docs/research.md).

    Attributes:
        transport: merge writers by the map of this method (`folding` keeps most accuracy); with
            `none` channels are selected. Sums of transported channels are brought to the spread
            of their parts.
        choice: which channels survive where they are selected, and what `intra-fusion` transports
            the others onto: `greedy` takes, one after the other, the channel that explains most
            reader-weighted covariance of what is left (pivoted Cholesky); `importance` takes the
            most important ones.
    """

    name: ClassVar[str] = "moment"
    folds_batchnorm: ClassVar[bool] = True
    order: ClassVar[Literal["forward", "backward"]] = "forward"
    chooses: ClassVar[bool] = True  # selects, where channels may not be combined, and reads out

    transport: Transport = "folding"
    choice: Choice = "greedy"

    def __post_init__(self) -> None:
        check_choices(self, {"source": Source, "choice": Choice, "transport": Transport})
        super().__post_init__()

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        if SUMMED in group.chosen:
            return Select()(group, scores, width, context)
        transport = "none" if group.chosen else self.transport
        if transport == "folding":
            step = Folding()(group, scores, width, context)
        else:
            keep = most_important(scores, width)
            known = {}
            if self.choice == "greedy":
                known = self.readings(group, context.weights, context)
                keep = explaining_channels(list(known.values()), width) if known else keep
            step = MergeMap.select(group.name, len(scores), keep)
            if transport == "none" and (known or group.chosen):
                found = {name: r.narrowed(slice(None), keep) for name, r in known.items()}
                return self._read_out(step, found, context)
            if transport == "intra-fusion":
                step = fused(group, keep, context)
        (found,) = self.readings_beside(group, [step], context)
        return self._read_out(step, found, context)

    def _read_out(self, step: MergeMap, found, context: Context) -> MergeMap:
        return with_readout(step, found, context.weights, ridge=self.ridge, max_gain=self.max_gain)


def fused(group: ChannelGroup, keep: Tensor, context: Context) -> MergeMap:
    """Transport a group's channels onto some of them, as means whose spread is restored.

    Args:
        group: the channel group.
        keep: (m,) ascending indices of the targets.
        context: the state of planning.
    """
    chosen = torch.zeros(context.weights.sizes[group.id])
    chosen[keep] = 1.0
    method = IntraFusion(normalisation="barycentric", features="all")
    step = method(group, chosen, len(keep), context)
    gain, shift = restored_variance(group, context, step.encode)
    return replace(step, writer_gain=gain, writer_shift=shift)
