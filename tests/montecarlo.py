"""Monte Carlo of real modules on Gaussian inputs, to hold propagated moments against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from intrafuse.graph import trace
from intrafuse.moments.propagate import Moments, Propagation
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

__all__ = ["Map", "agree", "distance", "found", "measured", "noise", "propagated", "seeded"]


class Map(nn.Module):
    """Modules in a row, then a function of their result."""

    def __init__(self, *modules: nn.Module, then: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.then = nn.Sequential(*modules), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build in evaluation mode, with seeded weights; norms get random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory().eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.InstanceNorm2d):
                for parameter in module.parameters():
                    nn.init.normal_(parameter)
        return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def propagated(model: nn.Module, x: Tensor, *, fold: bool = False) -> Moments | None:
    """Propagate unit inputs without correlation between positions to the model's output."""
    graph = trace(model, x[:2])
    weights = Weights.of(graph, model)
    if fold:
        fold_norms(weights)
    (output,) = graph.program.nodes[-1].all_input_nodes
    return Propagation(weights, length=0).of(output)


def found(model: nn.Module, x: Tensor, *, fold: bool = False) -> Moments:
    moments = propagated(model, x, fold=fold)
    assert moments is not None
    return moments


def measured(model: nn.Module, x: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the model's output along an axis, over all samples."""
    with torch.no_grad():
        lines = model(x.clone()).double().movedim(axis, 0).flatten(1)
    return lines.mean(1), lines.cov(correction=0)


def agree(model: nn.Module, x: Tensor, axis: int = 1, tol: float = 0.02) -> Moments:
    """Ask for mean and covariance up to sampling error, in units of the largest ones."""
    moments = found(model, x)
    mean, covariance = measured(model, x, axis)
    size = covariance.diagonal().max()
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=float(tol * size.sqrt()))
    torch.testing.assert_close(moments.covariance, covariance, rtol=0, atol=float(tol * size))
    return moments


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm())
