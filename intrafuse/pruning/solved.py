"""Layers that a method solved on data, after the maps of all groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.weights import Weights

__all__ = ["Solved"]

SAME = 1e-2  # largest relative difference of mean squares; half precision rounds by less


@dataclass(frozen=True, eq=False)
class Solved:
    """New weights and biases of a pruned network.

    They fit only the network that they were solved for, so a mark of each replaced weight is kept.

    Attributes:
        tensors: by name.
        marks: mean square of each weight that is replaced, by name; biases have none.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    marks: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weights: Weights) -> Solved:
        """Mark the tensors that would replace those of a merged network."""
        layers = weights.graph.layers
        return cls(tensors, {name: _mark(weights, name) for name in tensors if name in layers})

    def put(self, weights: Weights) -> None:
        """Replace the tensors of a merged network.

        Raises:
            IntrafuseError: it is another network than that of the plan, or a tensor is not finite.
        """
        for layer in weights.graph.layers.values():
            if layer.weight not in self.marks:
                continue
            old, mark = weights.state[layer.weight], self.marks[layer.weight]
            if not abs(_mark(weights, layer.weight) - mark) <= SAME * mark:
                raise IntrafuseError(
                    "a plan that solved layers on data can be applied only to the network that it "
                    "was made for, but the weights differ",
                    layer=layer.name,
                    remedy="make the plan from this network",
                )
            names = [name for name in layer.tensors if name in self.tensors]
            if not all(torch.isfinite(self.tensors[name]).all() for name in names):
                raise IntrafuseError("solved weights must be finite", layer=layer.name)
            weights.put({name: self.tensors[name].to(old) for name in names})


def _mark(weights: Weights, name: str) -> float:
    return float(weights.state[name].float().square().mean())
