"""Ways to write one function: tiny networks that differ in spelling and in nothing else.

`TWINS` lists families by name. All spellings of a family give the same outputs with the same
parameters, so every method must make the same of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TWINS", "Family", "build"]


class Net(nn.Module):
    """Two layers with a function of the first between them, which may call a third."""

    def __init__(self, then: Callable[..., Tensor], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, *third = layers
        self.third, self.then = nn.ModuleList(third), then

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.then(self.first(x), *self.third))


@dataclass(frozen=True)
class Family:
    """Layers, the shape of the input (batch included), and spellings by name."""

    layers: Callable[[], Sequence[nn.Module]]
    shape: tuple[int, ...]
    spellings: dict[str, Callable[..., Tensor]]


def build(family: str) -> tuple[dict[str, nn.Module], Tensor]:
    """Make all spellings of a family with the same weights, and an input for them."""
    known = TWINS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = known.layers()
        models = {name: Net(then, layers).eval() for name, then in known.spellings.items()}
        return models, torch.randn(known.shape)


def half(x: Tensor) -> int:
    return x.shape[-1] // 2


def gated(parts: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
    def then(x: Tensor) -> Tensor:
        a, b = parts(x)
        return F.silu(a) * b

    return then


HALVES = {
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split(half(x), -1),
    "sections": lambda x: x.split([half(x), x.shape[-1] - half(x)], -1),
    "slices": lambda x: (x[..., : half(x)], x[..., half(x) :]),
    "slices from behind": lambda x: (x[:, : -half(x)], x[:, -half(x) :]),
    "narrow": lambda x: (x.narrow(-1, 0, half(x)), x.narrow(-1, half(x), half(x))),
    "tensor_split": lambda x: x.tensor_split(2, -1),
    "unflatten and unbind": lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
    "view and index": lambda x: (lambda y: (y[:, 0], y[:, 1]))(x.view(len(x), 2, -1)),
    "reshape and select": lambda x: (lambda y: (y.select(1, 0), y.select(1, 1)))(
        x.reshape(len(x), 2, half(x))
    ),
}
MEANS = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean twice": lambda x: x.mean(-1).mean(-1),
    "squeeze": lambda x: x.mean((-1, -2), keepdim=True).squeeze(-1).squeeze(-1),
    "index": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "view": lambda x: F.avg_pool2d(x, 6).view(len(x), -1),
    "select": lambda x: F.adaptive_avg_pool2d(x, 1).select(3, 0).select(2, 0),
    "flat": lambda x: x.flatten(2).mean(-1),
    "sum over number": lambda x: x.sum((2, 3)) / 36,
    "sums times number": lambda x: x.sum(-1).sum(-1) * (1 / 36),
    "tokens": lambda x: x.flatten(2).permute(0, 2, 1).mean(1),
    "adaptive in one dimension": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1).squeeze(-1),
}
MAXIMA = {
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "squeeze": lambda x: F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "pool": lambda x: F.max_pool2d(x, 6).flatten(1),
    "amax": lambda x: x.amax((2, 3)),
    "max of flat": lambda x: x.flatten(2).max(-1).values,
    "max twice": lambda x: x.max(-1)[0].max(-1)[0],
    "with indices": lambda x: F.max_pool2d(x, 6, return_indices=True)[0].flatten(1),
    "negative minimum": lambda x: -(-x).amin((2, 3)),
}
FLAT = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(len(x), -1),
    "reshape": lambda x: x.reshape(x.shape[0], x.shape[1] * 9),
    "in two steps": lambda x: x.flatten(2).flatten(1),
    "there and back": lambda x: x.flatten(1).unflatten(1, (-1, 9)).flatten(1),
    "as another": lambda x: x.view_as(x.flatten(1)),
    "of permuted": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).reshape(len(x), -1),
}
TRANSPOSED = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(1, -1),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: x.moveaxis(-1, 1),
}
RELU = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "clamp with a tensor": lambda x: x.clamp(min=torch.tensor(0.0)),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "leaky": lambda x: F.leaky_relu(x, 0.0),
    "half of a sum": lambda x: (x + x.abs()) / 2,
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: -torch.minimum(-x, torch.zeros_like(x)),
    "product with a comparison": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "difference": lambda x: x - x.clamp(max=0),
    "in place": nn.ReLU(inplace=True),
    "new dimension": lambda x: F.relu(x)[..., None][..., 0],
    "nan_to_num": lambda x: F.relu(x).nan_to_num(),
}
SQUARE = {
    "power": lambda x: x**2,
    "square": torch.square,
    "product": lambda x: x * x,
    "of absolute": lambda x: x.abs() ** 2.0,
    "root of the fourth": lambda x: (x**4).sqrt(),
}
SILU = {
    "silu": F.silu,
    "sigmoid": lambda x: x * x.sigmoid(),
    "quotient": lambda x: x / (1 + torch.exp(-x)),
    "reciprocal": lambda x: x * (1 + (-x).exp()).reciprocal(),
    "one over": lambda x: x * (1 / (1 + (-x).exp())),
    "negative power": lambda x: x * (1 + (-x).exp()) ** -1,
    "tanh": lambda x: x * (0.5 * (torch.tanh(x / 2) + 1)),
}
GELU = {
    "gelu": F.gelu,
    "erf": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "erf times": lambda x: 0.5 * x * (1 + torch.erf(x * 2**-0.5)),
}
MISH = {
    "mish": F.mish,
    "softplus": lambda x: x * torch.tanh(F.softplus(x)),
    "log1p": lambda x: x * torch.tanh(torch.log1p(x.exp())),
    "log": lambda x: x * torch.tanh((1 + x.exp()).log()),
}
SCALED = {
    "times": lambda x: x * 0.5 - 1,
    "over": lambda x: x / 2 - 1,
    "number first": lambda x: -1 + 0.5 * x,
    "tensor": lambda x: x * torch.tensor(0.5) - torch.tensor(1.0),
    "alpha": lambda x: torch.add(torch.full_like(x, -1.0), x, alpha=0.5),
    "lerp": lambda x: torch.lerp(torch.full_like(x, -2.0), x, 0.5),
    "rsub": lambda x: torch.rsub(x, 2) / -2,
    "ones": lambda x: x.div(2) - torch.ones_like(x),
}
SUMS = {
    "plus": lambda x, f: x + f(F.relu(x)),
    "other order": lambda x, f: f(F.relu(x)) + x,
    "sum": lambda x, f: sum([x, f(F.relu(x))]),
    "minus minus": lambda x, f: x - -f(F.relu(x)),
    "alpha": lambda x, f: torch.add(x, -f(F.relu(x)), alpha=-1),
    "in place": lambda x, f: x.add_(f(F.relu(x))),
}
BESIDE = {
    "cat": lambda x, f: torch.cat([F.relu(x), F.relu(f(x))], -1),
    "concat": lambda x, f: torch.concat([F.relu(x), F.relu(f(x))], 1),
    "relu behind": lambda x, f: F.relu(torch.cat([x, f(x)], -1)),
}
STACKED = {
    "stack": lambda x, f: torch.stack([F.relu(x), F.relu(f(x))], 1).flatten(1),
    "view": lambda x, f: torch.stack([F.relu(x), F.relu(f(x))], -2).view(len(x), -1),
    "cat": lambda x, f: torch.cat([F.relu(x)[:, None], F.relu(f(x)).unsqueeze(1)], 1).flatten(1),
}


def excited(times: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, nn.Module], Tensor]:
    def then(x: Tensor, f: nn.Module) -> Tensor:
        x = F.relu(x)
        return times(x, torch.sigmoid(f(x.mean((2, 3)))))

    return then


EXCITED = {
    "index": lambda x, s: x * s[:, :, None, None],
    "unsqueeze": lambda x, s: x * s.unsqueeze(-1).unsqueeze(-1),
    "view": lambda x, s: s.view(len(s), -1, 1, 1) * x,
    "expand": lambda x, s: x * s.view(*s.shape, 1, 1).expand_as(x),
    "unflatten": lambda x, s: x * s.unflatten(1, (-1, 1, 1)),
    "channels last": lambda x, s: (x.permute(2, 3, 0, 1) * s).permute(2, 3, 0, 1),
    "flat": lambda x, s: (x.flatten(2) * s[..., None]).view(x.shape),
}
SHUFFLED = {
    "view": lambda x: x.view(len(x), 3, -1, 6, 6).transpose(1, 2).reshape(x.shape),
    "unflatten": lambda x: x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2),
    "swapaxes": lambda x: x.view(len(x), 3, -1, 6, 6).swapaxes(1, 2).flatten(1, 2),
    "operator": lambda x: F.channel_shuffle(x, 3),
}
PIXELS = {
    "operator": lambda x: F.pixel_shuffle(x, 2),
    "by hand": lambda x: x.view(len(x), -1, 2, 2, 6, 6).permute(0, 1, 4, 2, 5, 3).reshape(
        len(x), -1, 12, 12
    ),
}  # fmt: skip


def after(
    function: Callable[[Tensor], Tensor], spellings: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Let every spelling follow a function."""
    return {name: (lambda x, then=then: then(function(x))) for name, then in spellings.items()}


class Normed(nn.Module):
    """RMS norm, as torch writes it or by hand."""

    def __init__(self, by_hand: bool, n: int) -> None:
        super().__init__()
        self.by_hand, self.eps = by_hand, 0.05
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, n))

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_hand:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


IMAGES = (64, 3, 6, 6)
VECTORS = (64, 6)
VECTOR = lambda: [nn.Linear(6, 16), nn.Linear(16, 5)]  # noqa: E731
IMAGE = lambda: [nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)]  # noqa: E731
TWINS = {
    "halves": Family(
        lambda: [nn.Linear(6, 32), nn.Linear(16, 5)], VECTORS,
        {name: gated(parts) for name, parts in HALVES.items()},
    ),
    "means": Family(IMAGE, IMAGES, after(F.relu, MEANS)),
    "maxima": Family(IMAGE, IMAGES, MAXIMA),
    "flat": Family(
        lambda: [nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 9, 5)], IMAGES,
        after(lambda x: F.max_pool2d(F.relu(x), 2), FLAT),
    ),
    "transposed": Family(
        lambda: [nn.Conv1d(3, 16, 3, padding=1), nn.Linear(16, 5)], (64, 3, 7),
        after(F.gelu, TRANSPOSED),
    ),
    "relu": Family(VECTOR, VECTORS, RELU),
    "square": Family(VECTOR, VECTORS, SQUARE),
    "silu": Family(VECTOR, VECTORS, SILU),
    "gelu": Family(VECTOR, VECTORS, GELU),
    "mish": Family(VECTOR, VECTORS, MISH),
    "scaled": Family(VECTOR, VECTORS, after(F.gelu, SCALED)),
    "sums": Family(lambda: [nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(12, 12)], VECTORS, SUMS),
    "beside": Family(
        lambda: [nn.Linear(6, 12), nn.Linear(24, 5), nn.Linear(12, 12)], VECTORS, BESIDE
    ),
    "stacked": Family(
        lambda: [nn.Linear(6, 12), nn.Linear(24, 5), nn.Linear(12, 12)], VECTORS, STACKED
    ),
    "excited": Family(
        lambda: [nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1), nn.Linear(12, 12)], IMAGES,
        {name: excited(times) for name, times in EXCITED.items()},
    ),
    "shuffled": Family(
        lambda: [nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)], IMAGES,
        after(F.relu, SHUFFLED),
    ),
    "pixels": Family(
        lambda: [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 5, 1)], IMAGES,
        after(F.relu, PIXELS),
    ),
}  # fmt: skip
