"""Networks drawn at random by hypothesis, and random weights that no error can hide in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

__all__ = ["RandomNetwork", "randomise"]

ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "hardswish": F.hardswish,
    "leaky": F.leaky_relu, "prelu": None,
}  # fmt: skip


class Unit(nn.Module):
    """A convolution with optional norm and activation, wired as its kind says."""

    def __init__(self, kind: str, inputs: int, outputs: int, norm: bool, activation: str) -> None:
        super().__init__()
        self.kind = kind
        self.act = nn.PReLU(outputs) if activation == "prelu" else ACTIVATIONS[activation]
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        elif kind == "grouped":
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, groups=2)
        elif kind == "depthwise":
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, groups=inputs)
        elif kind == "grouped-transposed":
            self.conv = nn.ConvTranspose2d(inputs, outputs, 3, 1, 1, groups=2)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=not norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Step(nn.Module):
    """One step of a random network."""

    def __init__(self, kind: str, channels: int, draw) -> None:
        super().__init__()
        self.kind = kind
        unit = {"norm": draw(st.booleans()), "activation": draw(st.sampled_from([*ACTIVATIONS]))}
        width = draw(st.sampled_from([4, 6, 8]))
        self.width = channels
        if kind in ("conv", "transposed"):
            self.a, self.width = Unit(kind, channels, width, **unit), width
        elif kind in ("grouped", "grouped-transposed"):
            self.a, self.width = Unit(kind, channels, width, **unit), width
        elif kind == "depthwise":
            self.width = channels * draw(st.sampled_from([1, 2]))
            self.a = Unit(kind, channels, self.width, **unit)
        elif kind in ("residual", "difference", "gate"):
            self.a = Unit("conv", channels, width, **unit)
            self.b = Unit("conv", width, channels, **unit)
        elif kind == "concat":
            self.a, self.width = Unit("conv", channels, width, **unit), channels + width
        elif kind == "double":
            self.width = 2 * channels
        elif kind == "chunk":
            self.a, self.b = (Unit("conv", channels // 2, width, **unit) for _ in "ab")
            self.width = 2 * width
        elif kind == "split":
            self.a, self.width = Unit("conv", channels - 2, width, **unit), width + 2
        elif kind == "pad":
            self.width = channels + 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "residual":
                return x + self.b(self.a(x))
            case "difference":
                return F.relu(x - self.b(self.a(x)))
            case "gate":
                return x * torch.sigmoid(self.b(self.a(x)).mean((2, 3), keepdim=True))
            case "concat":
                return torch.cat([x, self.a(x)], 1)
            case "double":
                return torch.cat([x, x], 1)
            case "chunk":
                first, second = x.chunk(2, 1)
                return torch.cat([self.a(first), self.b(second)], 1)
            case "split":
                first, second = torch.split(x, [2, x.shape[1] - 2], 1)
                return torch.cat([first, self.a(second)], 1)
            case "pad":
                return F.pad(x[:, :, ::1], (0, 0, 0, 0, 1, 2))
            case "pool":
                return F.max_pool2d(x, 2) if x.shape[-1] > 2 else x
            case "up":
                return F.interpolate(x, scale_factor=2) if x.shape[-1] < 8 else x
            case _:
                return self.a(x)


class RandomNetwork(nn.Module):
    """Steps drawn at random, then a head that flattens or averages."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.stem = Unit("conv", 3, draw(st.sampled_from([4, 6, 8])), True, "relu")
        width = self.stem.conv.out_channels
        self.steps = nn.ModuleList()
        for _ in range(draw(st.integers(1, 5))):
            kinds = [
                "conv", "transposed", "depthwise", "residual", "difference", "gate", "concat",
                "double", "pad", "pool", "up", "split",
            ]  # fmt: skip
            kinds += ["grouped", "grouped-transposed", "chunk"] if width % 2 == 0 else []
            step = Step(draw(st.sampled_from(kinds)), width, draw)
            self.steps.append(step)
            width = step.width
            if width > 48:
                break
        self.flat = draw(st.booleans())
        self.size = draw(st.sampled_from([1, 2]))
        self.head = nn.Linear(width * self.size**2 if self.flat else width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        if self.flat:
            return self.head(F.adaptive_avg_pool2d(x, self.size).flatten(1))
        return self.head(x.mean((2, 3)))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and statistic a random value, so that no error can hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            scale = 0.5 if tensor.dim() > 1 else 1.0
            tensor.data = scale * torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.data = tensor.data.abs() + 0.3
    return model.double().eval()
