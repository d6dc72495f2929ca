"""Moment rules: every operator against Monte Carlo of the real module on Gaussian inputs.

Where a rule is exact, mean and covariance agree to sampling error. Where it approximates, the
test says so, asks for the exact parts, and that it beats what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafuse.batchnorm import fold_norms
from intrafuse.graph import trace
from intrafuse.moments.gaussian import correlation
from intrafuse.moments.propagate import Moments, Propagation
from intrafuse.weights import Weights


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


# --- layers ---------------------------------------------------------------------------------

LAYERS = {
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6)),
    "multiplier": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 12, 2, groups=6)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 9, 3, groups=3)),
    "of inputs": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "strided": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, 2, groups=6)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, 2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 4, 2, padding=3, groups=2),
    "flattened": lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact_on_unit_inputs(name):
    agree(seeded(LAYERS[name]), noise(20_000, 4, 6, 6))


def test_depthwise_by_hand():
    model = seeded(LAYERS["depthwise"])
    before = found(model[0], noise(2, 4, 6, 6)).covariance
    w = model[1].weight.detach().double().flatten(1)
    torch.testing.assert_close(found(model, noise(2, 4, 6, 6)).covariance, (w @ w.T) * before)


def test_groups_that_share_no_input_are_not_correlated():
    covariance = found(nn.Conv2d(4, 8, 3, groups=2).eval(), noise(2, 4, 6, 6)).covariance
    assert not covariance[:4, 4:].any() and covariance[:4, :4].count_nonzero() == 16


@pytest.mark.parametrize("groups", [1, 6])
def test_folded_statistics_tell_the_spread_and_weights_the_correlation(groups):
    layers = (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=groups), nn.BatchNorm2d(6))
    model = seeded(lambda: nn.Sequential(*layers))
    norm = model[2]
    with torch.no_grad():
        norm.running_mean.copy_(noise(6))
        norm.running_var.copy_(noise(6, seed=2).square() + 0.2)
        norm.weight.copy_(noise(6, seed=3))
        norm.bias.copy_(noise(6, seed=4))
    told, x = found(model, noise(2, 4, 6, 6), fold=True), noise(2, 4, 6, 6)
    torch.testing.assert_close(told.mean, norm.bias.detach().double(), rtol=1e-5, atol=1e-5)
    std = told.covariance.diagonal().sqrt()
    torch.testing.assert_close(std, norm.weight.detach().double().abs(), rtol=1e-3, atol=1e-4)
    among, sign = correlation(found(model[:2], x).covariance)[0], norm.weight.detach().sign()
    if groups > 1:  # a dense layer takes its inputs for uncorrelated where a norm tells the rest
        among = among * torch.outer(sign, sign)
        torch.testing.assert_close(correlation(told.covariance)[0], among, rtol=0, atol=1e-5)


def test_embedding_is_exact_over_the_vocabulary():
    model = seeded(lambda: nn.Embedding(50, 6))
    words = torch.arange(50).reshape(10, 5)
    moments, (mean, covariance) = found(model, words), measured(model, words, axis=-1)
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.covariance, covariance)


# --- norms ----------------------------------------------------------------------------------


def test_layer_norm_of_like_channels_is_exact():
    for affine in (True, False):
        agree(seeded(lambda affine=affine: nn.LayerNorm(6, elementwise_affine=affine)),
              noise(200_000, 6))  # fmt: skip


def test_rms_norm_of_like_channels_is_exact():
    for affine in (True, False):
        agree(seeded(lambda affine=affine: nn.RMSNorm(6, elementwise_affine=affine)),
              noise(200_000, 6))  # fmt: skip


def test_rms_norm_takes_the_mean_from_what_enters():
    """Approximate: the second moment is gamma squared only where channels have like power."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.RMSNorm(64)))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(noise(64, 64))[0])
        model[0].bias.copy_(2.0 * noise(64, seed=5).sign())
    moments, (mean, covariance) = found(model, noise(2, 64)), measured(model, noise(50_000, 64))
    torch.testing.assert_close(moments.mean, mean, rtol=0.02, atol=0.01)
    torch.testing.assert_close(
        moments.mean.square() + moments.covariance.diagonal(),
        model[1].weight.detach().double().square(),
    )
    torch.testing.assert_close(
        moments.covariance.diagonal(), covariance.diagonal(), rtol=0.1, atol=0.01
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_instance_norm_is_exact(affine, track):
    model = seeded(lambda: nn.InstanceNorm2d(4, affine=affine, track_running_stats=track))
    agree(model, noise(200, 4, 40, 40))


def test_instance_norm_keeps_correlations():
    """Approximate where an instance has few positions: they share its mean and spread."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True)))
    agree(model, noise(200, 4, 40, 40), tol=0.05)


def test_group_norm_shares_the_spread_out():
    """Exact for like channels; else approximate: means and spreads inside a group differ."""
    agree(seeded(lambda: nn.GroupNorm(2, 6)), noise(400, 6, 30, 30))
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6)))
    moments, (_, covariance) = (
        found(model, noise(2, 4, 4, 4)),
        measured(model, noise(400, 4, 30, 30)),
    )
    known, true = correlation(moments.covariance)[0], correlation(covariance)[0]
    torch.testing.assert_close(known, true, rtol=0, atol=0.05)
    torch.testing.assert_close(moments.mean, model[1].bias.detach().double())


def test_layer_norm_over_the_channels_makes_them_sum_to_zero():
    """Approximate in spread, exact in what is left of a common part: nothing."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)))
    with torch.no_grad():
        model[0].weight += 3 * noise(8)  # all channels share most of what they do
        model[1].weight.fill_(1.0)
    known = found(model, noise(2, 8)).covariance
    true = measured(model, noise(100_000, 8))[1]
    entering = correlation(found(model[0], noise(2, 8)).covariance)[0]
    off = ~torch.eye(6, dtype=torch.bool)
    assert entering[off].min() > 0.5 and true.sum().abs() < 1e-3
    assert distance(known, true) < 0.3 * distance(entering, true)


def test_norms_of_other_layouts_describe_the_axis_that_they_normalise():
    last = found(seeded(lambda: nn.LayerNorm(5)), noise(2, 7, 5))
    assert len(last.mean) == 5
    image = seeded(lambda: nn.LayerNorm([3, 5, 5]))
    moments, (mean, _) = found(image, noise(2, 3, 5, 5)), measured(image, noise(4000, 3, 5, 5))
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.02)
    back = Map(
        *(nn.Conv2d(3, 4, 1), nn.ReLU()),
        then=lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    )
    assert len(found(back.eval(), noise(2, 3, 5, 5)).mean) == 4


def test_a_norm_after_an_unknown_operator_knows_mean_and_spread():
    model = seeded(lambda: Map(nn.Linear(4, 6), then=lambda x: F.layer_norm(torch.asinh(x), (6,))))
    torch.testing.assert_close(found(model, noise(2, 4)).covariance, torch.eye(6).double())


# --- pointwise ------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": lambda x: F.relu(x),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": lambda x: F.relu6(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "gelu": lambda x: F.gelu(x),
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
    "silu in place": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "sigmoid": lambda x: x.sigmoid_(),
    "tanh": lambda x: x.tanh_(),
    "elu": lambda x: F.elu(x, 0.7, inplace=True),
    "clamp": lambda x: x.clamp(-0.5, 1.0),
    "mish": lambda x: F.mish(x),
    "softplus": lambda x: F.softplus(x, 2.0),
    "cube": lambda x: x**3,
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x.pow(3)))),
    "softsign": lambda x: F.softsign(x),
    "two in a row": lambda x: 1 - torch.tanh(F.relu(2 * x - 1)),
    "square by hand": lambda x: x * x,
    "sum with itself": lambda x: x + F.relu(x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_of_gaussian_channels_are_exact(name):
    model = seeded(lambda: Map(nn.Linear(3, 5), then=ACTIVATIONS[name]))
    agree(model, noise(400_000, 3))


@pytest.mark.parametrize("slopes", [1, 5])
def test_prelu_is_exact(slopes):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(slopes)))
    with torch.no_grad():
        model[1].weight.copy_(noise(slopes))
    agree(model, noise(400_000, 3))


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


class Attention(nn.Module):
    """Multi-head attention, then its output without the last layer."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.qkv, self.fused = nn.Linear(6, 24), fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).view(b, t, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 8)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_has_the_moments_of_its_values(fused):
    """Approximate: exact for weights that put all on one value; else the spread is a bound."""
    model = seeded(lambda: Attention(fused))
    with torch.no_grad():  # equal weights: no key differs, so the output is the mean value
        for weight in (model.k.weight, model.qkv.weight[8:16]):
            weight.zero_()
    moments, (mean, covariance) = (
        found(model, noise(2, 5, 6)),
        measured(model, noise(40_000, 5, 6), axis=2),
    )
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.01)
    torch.testing.assert_close(moments.covariance / 5, covariance, rtol=0, atol=0.01)


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


# --- boundaries -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm])
def test_a_gamma_of_zero_leaves_a_constant(norm):
    made = norm(2, 6) if norm is nn.GroupNorm else norm(6, affine=True)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), made, nn.ReLU()))
    with torch.no_grad():
        model[1].weight[::2] = 0.0
        model[1].bias.fill_(0.5)
    moments = found(model, noise(2, 3, 4, 4))
    assert not moments.covariance[::2].any() and bool((moments.covariance[1::2, 1::2] != 0).any())
    torch.testing.assert_close(moments.mean[::2], torch.full((3,), 0.5).double())


def test_one_channel():
    for model in (nn.Conv2d(1, 1, 3, groups=1), nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())):
        agree(seeded(lambda model=model: model), noise(20_000, 1, 4, 4))
    norm = seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1)))
    moments = agree(norm, noise(50, 3))  # one channel less its own mean is nothing
    assert moments.covariance.tolist() == [[0.0]]


def test_constant_channels_stay_constant():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6),
                                         nn.InstanceNorm2d(6), nn.GELU()))  # fmt: skip
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    moments = found(model, noise(2, 3, 8, 8))
    assert not moments.covariance[:2].any() and torch.isfinite(moments.covariance).all()
    gate = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU()))
    with torch.no_grad():
        gate[0].weight[2:6] = 0.0
    agree(gate, noise(200_000, 3))


def test_inputs_without_channels_or_numbers_are_taken_as_they_come():
    sequence = seeded(lambda: Map(nn.Linear(6, 6), then=lambda x: x))
    assert len(found(sequence, noise(3, 5, 6)).mean) == 6  # channels last: a linear layer reads
    assert len(found(seeded(lambda: nn.Conv1d(3, 4, 1)), noise(3, 3, 6)).mean) == 4
