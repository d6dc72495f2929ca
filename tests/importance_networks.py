"""Networks and helpers that the tests of importance share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from intrafuse.graph import ExampleInputs, trace
from intrafuse.importance.metrics import Importance, score
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

NEEDS_DATA = ("taylor", "chip", "activation")
RUNS_MODEL = ("synflow", *NEEDS_DATA)


def make_context(
    model: nn.Module, inputs: ExampleInputs, data: Iterable | None = None, *, seed: int = 0
) -> Context:
    """Trace a model and take its weights, as `plan` does."""
    weights = Weights.of(trace(model, inputs), model)
    return Context(weights, weights.snapshot(), model, inputs, data, seed)


def ask(context: Context, name: str, metric: str | Importance) -> Tensor:
    """Score the group of this name."""
    return score(context.weights.graph.by_name[name], context, metric)


def mlp(first: list[list[float]], second: list[list[float]]) -> nn.Sequential:
    """Build linear, ReLU, linear from two weight matrices, without biases."""
    rows, columns = torch.tensor(first), torch.tensor(second)
    model = nn.Sequential(
        nn.Linear(rows.shape[1], rows.shape[0], bias=False),
        nn.ReLU(),
        nn.Linear(columns.shape[1], columns.shape[0], bias=False),
    )
    model[0].weight.data, model[2].weight.data = rows, columns
    return model


def convnet(channels: int = 5) -> nn.Sequential:
    """Build conv, batch norm, ReLU, max-pool, flatten, linear, with batch norm that matters."""
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 4, 3),
    )
    norm = model[1]
    norm.weight.data.uniform_(-2, 2)
    norm.bias.data.uniform_(0, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model


def labelled(batches: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 2, 4, 4), torch.randint(3, (size,))) for _ in range(batches)]


class Residual(nn.Module):
    """Two writers of one stream, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.branch = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x.relu())
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Two groups side by side in one batch norm and one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.head(x).mean((2, 3))


class Attention(nn.Module):
    """Two heads of four dimensions: a head is a channel, with a block of four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1).mean(1))
