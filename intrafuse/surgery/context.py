"""What importance metrics and methods may look at while a plan is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from intrafuse.graph.trace import ExampleInputs
from intrafuse.surgery.weights import Weights

__all__ = ["Context"]


@dataclass(eq=False)
class Context:
    """The state of planning. It changes as groups are merged, and so is not frozen.

    Attributes:
        weights: the tensors as merged so far, batch norm folded where the method asks for it.
            `merge_groups` merges them; metrics and methods read them, and change a `snapshot`.
        original: the tensors before any group was merged, batch norm folded alike.
        model: the module that was passed in; read it, never change it.
        example_inputs: what the model was traced with.
        data: batches of inputs, or of (inputs, labels), where the user gave any.
        seed: seeds everything random.
        progress: called with (steps done, steps in all) by work that takes long.
        cache: what a method keeps from one group of a plan to the next.
    """

    weights: Weights
    original: Weights
    model: nn.Module
    example_inputs: ExampleInputs
    data: Iterable | None = None
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Make a random generator that depends on the seed and a salt only."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + salt) % 2**63)

    def untouched(self) -> Context:
        """Return the same context with the original tensors as the current ones."""
        return replace(self, weights=self.original)
