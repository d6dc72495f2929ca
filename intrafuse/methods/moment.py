"""Moment matching: each reader re-solves for the old activations from the new ones.

See `intrafuse.moments.readout` for the mathematics of the readout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.rules.products import SUMMED
from intrafuse.graph.typed import from_numpy
from intrafuse.methods.folding import Folding, restored_variance
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.method import Method
from intrafuse.methods.select import most_important
from intrafuse.moments.attention import place_encode, with_products
from intrafuse.moments.explain import explaining_blocks, explaining_channels
from intrafuse.moments.readers import Reading
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

    If a normalization layer precedes the activation, no data is needed: the norm tells mean and
    standard deviation, and the weights tell correlations. Otherwise inputs of unit variance are
    assumed and propagated.

    In attention, whole heads are selected with their queries and keys, and the output projection
    re-solves for the outputs of all heads from those of the kept heads. The width inside heads is
    reduced by new queries, keys and values for each head, whose products are closest to the old
    ones (`intrafuse.moments.attention`). If another operator stands between a layer and the
    product, that width is selected by importance. Without data the outputs of attention get no
    gain and no shift, because their means are unknown (docs/research.md).

    Attributes:
        transport: method whose map merges the writers (`folding` keeps most accuracy); with `none`
            channels are selected. Gains restore the standard deviation of merged channels.
        choice: channels to select, or targets of `intra-fusion`. `greedy` takes one channel after
            the other, each time the one that explains most of the reader-weighted covariance not
            yet explained (pivoted Cholesky). `importance` takes the most important channels.
    """

    name: ClassVar[str] = "moment"
    folds_batchnorm: ClassVar[bool] = True
    order: ClassVar[Literal["forward", "backward"]] = "forward"
    chooses: ClassVar[bool] = (
        True  # selects channels that must not be combined, and re-solves their readers
    )

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
            merge_map = Folding()(group, scores, width, context)
        else:
            keep = most_important(scores, width)
            known = {}
            if self.choice == "greedy":
                known = self.readings(group, context.weights, context)
                keep = explaining_channels(list(known.values()), width) if known else keep
            merge_map = MergeMap.select(group.name, len(scores), keep)
            if self.transport == "none" and known:
                selected = {name: r.narrowed(slice(None), keep) for name, r in known.items()}
                return self._read_out(merge_map, selected, context)
            if self.transport == "intra-fusion":
                merge_map = fused(group, keep, context)
        later = self.solves_later(context)
        (beside,) = self.readings_beside(group, [merge_map], context, without=later)
        return self._read_out(merge_map, beside, context)

    def _of_attention(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Reduce heads or the width inside them, and re-solve readers for all places at once."""
        weights = context.weights
        known = self.readings(group, weights, context, places=True)
        keep = most_important(scores, width)
        summed = SUMMED in group.chosen
        if known and self.choice == "greedy" and not summed:
            slot = next(slot for slot in group.readers if slot.parameter in known)
            blocks = weights.graph.blocks(slot, group.id, weights.sizes)
            places = from_numpy(positions(blocks, len(scores)))
            keep = explaining_blocks(list(known.values()), places, width)
        merge_map = MergeMap.select(group.name, len(scores), keep)
        if summed:
            merge_map = with_products(merge_map, group, known, self, context)
        encoded = {
            n: r.encoded(place_encode(merge_map, group, n, weights)) for n, r in known.items()
        }
        merge_map = self._read_out(merge_map, encoded, context)
        return merge_map if self.source != "analytic" else replace(merge_map, gain={}, shift={})

    def _read_out(
        self, merge_map: MergeMap, readings: Mapping[str, Reading], context: Context
    ) -> MergeMap:
        return with_readout(
            merge_map, readings, context.weights, ridge=self.ridge, max_gain=self.max_gain
        )


def fused(group: ChannelGroup, keep: Tensor, context: Context) -> MergeMap:
    """Transport a group's channels onto some of them, as means with restored deviation.

    Args:
        group: the channel group.
        keep: (m,) ascending indices of the targets.
        context: the state of planning.
    """
    chosen = torch.zeros(context.weights.sizes[group.id])
    chosen[keep] = 1.0
    method = IntraFusion(normalisation="barycentric", features="all")
    merge_map = method(group, chosen, len(keep), context)
    gain, shift = restored_variance(group, context, merge_map.encode)
    return replace(merge_map, writer_gain=gain, writer_shift=shift)
