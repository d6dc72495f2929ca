"""Moment matching: every reader re-solves for itself how to read the old activations from the new.

See `intrafuse.moments.readout` for the mathematics of the readout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.rules.products import SUMMED
from intrafuse.methods.folding import Folding, restored_variance
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.method import Method
from intrafuse.methods.select import most_important
from intrafuse.moments.attention import place_encode, with_products
from intrafuse.moments.explain import explaining_blocks, explaining_channels
from intrafuse.moments.readout import with_readout
from intrafuse.moments.sources import MomentSource, Source
from intrafuse.support.arguments import check_choices
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["Moment"]

MergedBy = Literal["none", "intra-fusion", "folding"]
Choice = Literal["greedy", "importance"]


@dataclass(frozen=True, kw_only=True)
class Moment(MomentSource, Method):
    """Match moments: keep or merge channels, then re-solve each reader (ours; DESIGN section 6).

    No data is needed where a normalisation layer stands before the activation: mean and spread
    come from the norm, correlations from the weights. Without one, inputs of unit variance are
    assumed and propagated.

    Of attention, whole heads are selected with their queries and keys, and the output projection
    reads what all of the lost ones gave from all that the kept ones give. The width inside heads
    is that of the best products: each head gets queries and keys, and values, of its own that
    come closest to the old ones (`intrafuse.moments.attention`); where the network does
    anything else between a layer and the product, it is selected by importance. Without data the
    outputs of attention get no gain and no shift: their means are not known (docs/research.md).

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

    transport: MergedBy = "folding"
    choice: Choice = "greedy"

    def __post_init__(self) -> None:
        check_choices(self, {"source": Source, "choice": Choice, "transport": MergedBy})
        super().__post_init__()

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        if group.chosen:
            return self._of_attention(group, scores, width, context)
        if self.transport == "folding":
            step = Folding()(group, scores, width, context)
        else:
            keep = most_important(scores, width)
            known = {}
            if self.choice == "greedy":
                known = self.readings(group, context.weights, context)
                keep = explaining_channels(list(known.values()), width) if known else keep
            step = MergeMap.select(group.name, len(scores), keep)
            if self.transport == "none" and known:
                found = {name: r.narrowed(slice(None), keep) for name, r in known.items()}
                return self._read_out(step, found, context)
            if self.transport == "intra-fusion":
                step = fused(group, keep, context)
        (found,) = self.readings_beside(group, [step], context)
        return self._read_out(step, found, context)

    def _of_attention(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Choose heads, or the width inside them, and let readers solve for all places at once."""
        weights = context.weights
        known = self.readings(group, weights, context, places=True)
        keep = most_important(scores, width)
        summed = SUMMED in group.chosen
        if known and self.choice == "greedy" and not summed:
            slot = next(slot for slot in group.readers if slot.parameter in known)
            blocks = weights.graph.blocks(slot, group.id, weights.sizes)
            places = torch.from_numpy(positions(blocks, len(scores)))
            keep = explaining_blocks(list(known.values()), places, width)
        step = MergeMap.select(group.name, len(scores), keep)
        if summed:
            step = with_products(step, group, known, self, context)
        found = {n: r.encoded(place_encode(step, group, n, weights)) for n, r in known.items()}
        step = self._read_out(step, found, context)
        return step if self.source != "analytic" else replace(step, gain={}, shift={})

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
