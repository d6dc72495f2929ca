"""The members of a fusion, and their weighted mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["Member", "combine"]


@dataclass(frozen=True, eq=False)
class Member:
    """One network of a fusion.

    Attributes:
        model: the module.
        weights: its tensors, batch norm folded.
        maps: merge maps from its channels to the reference's; none for the reference.
        share: its weight w_k; all weights sum to one.
    """

    model: nn.Module
    weights: Weights
    maps: tuple[MergeMap, ...]
    share: float

    def aligned(self) -> Weights:
        """Return its tensors with channels in the order of the reference."""
        aligned = self.weights.snapshot()
        for merge_map in self.maps:
            aligned.merge(merge_map)
        return aligned


def combine(members: Sequence[Member], reference: Weights) -> Weights:
    """Average the aligned tensors of all networks.

    Tensors outside the trace and tensors without floating-point numbers come from the reference.
    """
    averaged: dict[str, Tensor] = {}
    parts: list[tuple[float, Mapping[str, Tensor]]] = [
        (member.share, member.aligned().state) for member in members
    ]
    for name in sorted(reference.graph.axes):
        present = [(share, state[name]) for share, state in parts if name in state]
        if not present and name in reference.state:  # a bias that only the reference has
            averaged[name] = torch.zeros_like(reference.state[name])
        if not present:
            continue
        tensor = present[0][1]
        if not tensor.is_floating_point():
            continue
        exact = torch.promote_types(tensor.dtype, torch.float32)
        device = reference.state.get(name, tensor).device
        total = sum(share * t.to(device, exact) for share, t in present)
        assert isinstance(total, Tensor)
        averaged[name] = total.to(tensor.dtype)
    fused = reference.snapshot()
    fused.put(averaged)
    return fused
