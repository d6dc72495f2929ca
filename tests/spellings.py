"""Networks of one function between two layers, for its spellings."""

from __future__ import annotations

import torch
from networks import Net
from random_networks import randomise
from torch import nn

import intrafuse

__all__ = ["LINE", "SEQUENCE", "network", "pruned_widths"]

LINE = torch.randn(3, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(2, 7, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def network(function, shape: tuple[int, ...] | None = None, out: int = 8) -> nn.Module:
    """Make a network of two layers with a function of the first between them, and a parameter."""
    parts: dict[str, nn.Module | nn.Parameter] = {"a": nn.Linear(5, 8), "b": nn.Linear(5, 8)}
    if shape is not None:
        parts["p"] = nn.Parameter(torch.ones(*shape))
    return randomise(Net(lambda n, x: n.c(function(n, n.a(x))), **parts, c=nn.Linear(out, 2)), 0)


def pruned_widths(model: nn.Module, x: torch.Tensor, far: float = 1e-12) -> list[int]:
    """List the sizes of the groups, once pruned networks equal their masked originals."""
    for share, seed in ((0.3, 0), (0.7, 1)):
        plan = intrafuse.plan(
            model, x, channels=share, method="select", importance="random", seed=seed
        )
        found = intrafuse.verify(model, plan)
        assert found.relative < far < 1e-3 < found.effect
    return sorted(plan.graph.widths.values())
