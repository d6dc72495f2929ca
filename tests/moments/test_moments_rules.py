"""Moment rules of layers, norms and activations, held against Monte Carlo.

Where a rule is exact, mean and covariance agree to sampling error. Where it approximates, the
test says so, asks for the exact parts, and that it beats what it replaces.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from montecarlo import Map, agree, distance, found, measured, noise, seeded
from torch import nn

from intrafuse.moments.gaussian import correlation

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
    single = found(seeded(lambda: nn.Sequential(nn.Linear(1, 1), nn.ReLU())), noise(2, 1))
    assert single.covariance.shape == (1, 1) and float(single.covariance) > 0
    norm = seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1)))
    moments = found(norm, noise(2, 3))  # one channel less its own mean is nothing
    torch.testing.assert_close(moments.mean, norm[1].bias.detach().double())
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
