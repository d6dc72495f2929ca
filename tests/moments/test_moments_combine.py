"""Moment rules of sums, gates, cat, shapes, held against Monte Carlo.

Where a rule is exact, mean and covariance agree to sampling error. Where it approximates, the
test says so, asks for the exact parts, and that it beats what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from montecarlo import Map, agree, distance, found, measured, noise, propagated, seeded
from torch import Tensor, nn

from intrafuse.moments.gaussian import correlation

# --- sums, gates, cat -----------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers read the same input."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(6, 5), nn.Linear(6, 5), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.a(x), self.b(x))


class Apart(Two):
    """As `Two`, but each layer reads its own half of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.a(x[:, :6]), self.b(x[:, 6:]))


def test_a_sum_of_independent_branches_is_exact():
    agree(seeded(lambda: Apart(lambda a, b: F.relu(a) - b)), noise(400_000, 12))


def test_a_sum_of_layers_with_the_same_input_is_exact():
    agree(seeded(lambda: Two(lambda a, b: a + F.relu(b))), noise(400_000, 6))


def test_a_gate_of_independent_factors_is_exact():
    agree(seeded(lambda: Apart(lambda a, b: F.relu(a) * torch.sigmoid(b))), noise(400_000, 12))


def test_a_product_of_gaussian_factors_is_exact():
    agree(seeded(lambda: Two(lambda a, b: a * b)), noise(400_000, 6), tol=0.03)


GATES = {
    "silu, two layers": lambda: Two(lambda a, b: F.silu(a) * b),
    "relu, two layers": lambda: Two(lambda a, b: F.relu(a) * torch.sigmoid(b)),
    "chunk": lambda: Map(nn.Linear(6, 10), then=lambda x: F.silu(x.chunk(2, -1)[0]) * x[:, 5:]),
    "split": lambda: Map(nn.Linear(6, 10), then=lambda x: (lambda a, b: a * F.gelu(b))(
        *x.split(5, 1))),
    "glu": lambda: nn.Sequential(nn.Linear(6, 10), nn.GLU()),
    "glu on images": lambda: nn.Sequential(nn.Conv2d(6, 10, 1), nn.GLU(1), nn.Flatten()),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", GATES)
def test_gates_know_how_their_factors_are_correlated(name, seed):
    """Mean and variances are exact, covariances up to the third power of correlations."""
    model = seeded(GATES[name], seed)
    x = noise(400_000, 6)
    moments = agree(model, x[:, :, None, None] if "images" in name else x, tol=0.03)
    assert torch.linalg.eigvalsh(moments.covariance).min() > -1e-9


@pytest.mark.parametrize("name", ["relu, two layers", "split"])
def test_gates_with_the_same_weights(name):
    """Variables with correlation one: the products are functions of one variable."""
    model = seeded(GATES[name])
    with torch.no_grad():
        if name == "split":
            model.first[0].weight[5:] = model.first[0].weight[:5]
        else:
            model.b.weight.copy_(-model.a.weight)
    agree(model, noise(400_000, 6), tol=0.03)


class SqueezeExcite(nn.Module):
    """Scale the channels of a map by a gate that a pooled path computes."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, n, 3, padding=1), nn.Conv2d(n, 5, 1)
        self.down, self.up = nn.Conv2d(n, 4, 1), nn.Conv2d(4, n, 1)

    def gated(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.gated(x)).mean((2, 3))


class Gated(SqueezeExcite):
    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x)


def test_squeeze_and_excite_counts_the_gate_as_independent():
    """Approximate: the gate's mean is right; its spread is that of a single position."""
    model = seeded(Gated)
    with torch.no_grad():
        model.up.bias.copy_(2 * noise(8))
    x = noise(2000, 3, 8, 8)
    moments, (mean, covariance) = found(model, x), measured(model, x)
    torch.testing.assert_close(moments.mean, mean, rtol=0.05, atol=0.02)
    torch.testing.assert_close(
        moments.covariance.diagonal(), covariance.diagonal(), rtol=0.15, atol=0.01
    )
    with torch.no_grad():
        bare = F.relu(model.enter(x)).double().movedim(1, 0).flatten(1)
    assert distance(moments.covariance, covariance) < 0.3 * distance(bare.cov(), covariance)


def test_a_gate_of_one_channel_broadcasts():
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x[:, :3]) * torch.sigmoid(self.b(x[:, 3:]))

    agree(seeded(Spatial), noise(100_000, 6, 2, 2))


def test_parameters_scale_and_shift():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gamma = nn.Conv2d(3, 6, 1), nn.Parameter(noise(6))
            self.beta, self.one = nn.Parameter(noise(6, 1, 1)), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.layer(x)) * self.gamma.view(1, -1, 1, 1) + self.beta
            return self.one * (2 - x) / 3

    agree(seeded(Scaled), noise(100_000, 3, 2, 2))


def test_a_position_embedding_adds_its_own_spread():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.where = nn.Linear(3, 6), nn.Parameter(noise(1, 7, 6))
            self.word = nn.Parameter(3 * noise(1, 1, 6, seed=2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.word.expand(len(x), -1, -1), self.layer(x)], 1)
            return x + self.where

    # Approximate in one thing: a position's own word and its own embedding are independent.
    model = seeded(Embedded)
    moments, (mean, _) = found(model, noise(2, 6, 3)), measured(model, noise(50_000, 6, 3), 2)
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.02)
    agree(seeded(lambda: Map(nn.Linear(3, 6), then=lambda x: torch.cat([x, 1 - F.relu(x)], 1))),
          noise(100_000, 4, 3), axis=2)  # fmt: skip


CATS = {
    "of both signs": lambda: Map(nn.Linear(6, 4), then=lambda x: F.relu(torch.cat([x, -x], 1))),
    "of relu": lambda: Map(nn.Linear(6, 4), then=lambda x: torch.cat([F.relu(x), F.relu(-x)], 1)),
    "of two layers": lambda: Two(lambda a, b: torch.cat([F.relu(a), b], -1)),
    "of three": lambda: Two(lambda a, b: torch.cat([a, b, torch.tanh(b)], 1)),
}


@pytest.mark.parametrize("name", CATS)
def test_cat_is_exact(name):
    agree(seeded(CATS[name]), noise(400_000, 6))


# --- shape ----------------------------------------------------------------------------------

SHAPES = {
    "slice": lambda x: F.relu(x)[:, 2:9],
    "slice from the end": lambda x: x[:, -5:],
    "slice of positions": lambda x: F.relu(x)[:, :, 1:, ::2],
    "narrow": lambda x: x.narrow(1, 3, 4),
    "chunk": lambda x: F.relu(x).chunk(3, 1)[1],
    "split": lambda x: x.split([2, 7, 3], 1)[1],
    "split of positions": lambda x: F.relu(x).split(2, 2)[1],
    "unbind of positions": lambda x: F.relu(x).unbind(3)[1],
    "select of positions": lambda x: F.relu(x)[:, :, 0],
    "select of a factor": lambda x: x.view(-1, 3, 4, 4, 4)[:, 1],
    "unbind of a factor": lambda x: x.unflatten(1, (3, 4)).unbind(2)[-1].sigmoid(),
    "shuffle": lambda x: F.relu(x).view(-1, 3, 4, 4, 4).transpose(1, 2).flatten(1, 2),
    "there and back": lambda x: F.gelu(x.flatten(2).transpose(1, 2)).permute(0, 2, 1).unsqueeze(3),
    "squeeze": lambda x: F.relu(x).unsqueeze(2).squeeze(2).contiguous(),
    "pad of positions": lambda x: F.pad(x, (0, 0)),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_moves_channels_is_exact(name):
    agree(seeded(lambda: Map(nn.Conv2d(3, 12, 1), then=SHAPES[name])), noise(20_000, 3, 4, 4))


def test_other_positions_of_an_activation_are_other_variables():
    model = Map(nn.Conv2d(3, 6, 1), then=lambda x: F.relu(x[:, :, 1:]) * x[:, :, :-1])
    agree(seeded(lambda: model), noise(20_000, 3, 4, 4))


def test_padded_channels_are_constant():
    model = seeded(lambda: Map(nn.Conv2d(3, 4, 1),
                               then=lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5)))  # fmt: skip
    moments = agree(model, noise(20_000, 3, 4, 4))
    assert moments.mean[[0, 5, 6]].tolist() == [0.5] * 3
    assert not moments.covariance[[0, 5, 6]].any()


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_pooling_keeps_order_and_correlation(pool):
    """Approximate: spreads shrink and maxima grow, for all channels alike."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), pool))
    moments, (mean, covariance) = (
        found(model, noise(2, 3, 4, 4)),
        measured(model, noise(20_000, 3, 4, 4)),
    )
    assert float(torch.corrcoef(torch.stack([moments.mean, mean]))[0, 1]) > 0.9
    known, true = correlation(moments.covariance)[0], correlation(covariance)[0]
    assert distance(known, true) < 0.8 * distance(torch.eye(6).double(), true)


UNKNOWN = {
    "softmax": lambda x: x.softmax(1),
    "root": lambda x: x**0.5,
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "quotient": lambda x: 1 / x,
    "power of a tensor": lambda x: torch.pow(x, x),
    "strided": lambda x: x[:, ::2],
    "selected": lambda x: x[:, 1],
    "taken apart": lambda x: x.unbind(1)[2],
    "norm by hand": lambda x: x / x.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_rule_describes_has_no_moments(name):
    assert propagated(Map(nn.Conv2d(3, 4, 1), then=UNKNOWN[name]), noise(2, 3, 4, 4)) is None
