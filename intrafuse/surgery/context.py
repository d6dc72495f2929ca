"""The state of planning that importance metrics and methods read."""

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
    """The state of planning. It is not frozen, because it changes as groups are merged.

    Attributes:
        weights: the tensors as merged so far, with batch norm folded if the method asks for it.
            `merge_groups` merges them; metrics and methods only read them, or change a `snapshot`.
        original: the tensors before any merge, with batch norm folded in the same way.
        model: the caller's module; read it, never change it.
        example_inputs: inputs that the model was traced with.
        data: batches of inputs, or of (inputs, labels); None if the user gave none.
        seed: seeds everything random.
        progress: called with (steps done, all steps) by slow work.
        pending: names of the groups that are still to be merged.
        cache: values that a method keeps from one group of a plan to the next.
    """

    weights: Weights
    original: Weights
    model: nn.Module
    example_inputs: ExampleInputs
    data: Iterable[Any] | None = None
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    pending: frozenset[str] = frozenset()
    cache: dict[str, Any] = field(default_factory=dict[str, Any])

    def generator(self, salt: int = 0) -> torch.Generator:
        """Make a random generator that depends only on the seed and a salt."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + salt) % 2**63)

    def untouched(self) -> Context:
        """Return the same context with the original tensors as the current ones."""
        return replace(self, weights=self.original)
