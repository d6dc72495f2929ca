"""Moment matching on whole networks whose operators need more than convolution and ReLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn

import intrafuse
from intrafuse.methods import Moment


def separable() -> nn.Module:
    """Depthwise convolutions between pointwise ones."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(24, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6)),
    )


class SwiGLU(nn.Module):
    """The feed-forward block of a Llama: two layers read the same input, or one is split."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.norm, self.both = nn.RMSNorm(6), nn.Linear(6, 128, bias=False) if fused else None
        if not fused:
            self.gate, self.up = nn.Linear(6, 64, bias=False), nn.Linear(6, 64, bias=False)
        self.down, self.head = nn.Linear(64, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate, up = (self.gate(y), self.up(y)) if self.both is None else self.both(y).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * up))


class SqueezeExcite(nn.Module):
    """A pooled path scales the channels of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.bn = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.down, self.up = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.leave, self.bn2 = nn.Conv2d(24, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.enter(x)))
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        x = F.relu(self.bn2(self.leave(x * torch.sigmoid(gate))))
        return self.head(x.mean((2, 3)))


class LayerNormMLP(nn.Module):
    """The feed-forward block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 48), nn.Linear(48, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x)


NETWORKS = {
    "separable": (separable, (64, 3, 8, 8)),
    "swiglu": (SwiGLU, (256, 6)),
    "swiglu, fused": (lambda: SwiGLU(fused=True), (256, 6)),
    "swiglu on sequences": (SwiGLU, (32, 9, 6)),
    "squeeze and excite": (SqueezeExcite, (64, 3, 8, 8)),
    "layer norm": (LayerNormMLP, (256, 8)),
    "layer norm on sequences": (LayerNormMLP, (32, 9, 8)),
}


def trained_looking(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """Seed a network, and let its batch norms estimate their statistics."""
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise(factory())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        with torch.no_grad():
            model.train()(torch.randn(512, *shape[1:]))
        return model.eval(), torch.randn(shape)


def lost(model: nn.Module, x: Tensor, method: object) -> float:
    pruned = intrafuse.prune(model, x[:2], channels=0.5, method=method).model  # type: ignore
    with torch.no_grad():
        return float((pruned(x) - model(x)).norm())


@pytest.mark.parametrize("method", ["moment", Moment(transport="none")], ids=["merge", "select"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_readouts_bring_the_output_closer_than_selection(name, seed, method):
    model, x = trained_looking(name, seed)
    assert lost(model, x, method) < lost(model, x, "select")
