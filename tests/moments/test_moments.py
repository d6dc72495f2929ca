"""Moments: against Monte Carlo and NumPy; readouts: identity, duplicates, degenerate cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build, covering
from torch import nn

import intrafuse
from intrafuse.graph import trace
from intrafuse.methods import Moment
from intrafuse.moments.calibrate import Calibration
from intrafuse.moments.explain import explaining_channels
from intrafuse.moments.gaussian import correlation, hermite_coefficients, transformed_covariance
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import Reading, readings
from intrafuse.moments.readout import read_back
from intrafuse.moments.taps import output_variance, tap_correlation
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

ACTIVATIONS = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu,
    "hardswish": F.hardswish, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "elu": F.elu,
}  # fmt: skip


@pytest.fixture
def gaussian():
    """Four correlated Gaussian variables: mean, covariance and 400,000 samples."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(4, 4, generator=generator, dtype=torch.double)
    covariance = factor @ factor.T / 4
    mean = torch.tensor([0.3, -0.5, 0.0, 1.0], dtype=torch.double)
    noise = torch.randn(400_000, 4, generator=generator, dtype=torch.double)
    return mean, covariance, mean + noise @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moments_agree_with_monte_carlo(name, gaussian):
    mean, covariance, samples = gaussian
    relation, std = correlation(covariance)
    c = hermite_coefficients(ACTIVATIONS[name], mean, std)
    found = ACTIVATIONS[name](samples)
    torch.testing.assert_close(c[:, 0], found.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(
        transformed_covariance(c, c, relation), found.T.cov(), rtol=0.02, atol=0.01
    )


def test_relu_in_closed_form():
    c = hermite_coefficients(F.relu, torch.zeros(1), torch.ones(1))
    assert float(c[0, 0]) == pytest.approx(1 / np.sqrt(2 * np.pi), abs=2e-3)
    variance = float(transformed_covariance(c, c, torch.ones(1, 1).double()))
    assert variance == pytest.approx(0.5 - 1 / (2 * np.pi), abs=5e-3)


def test_a_linear_function_keeps_the_covariance(gaussian):
    mean, covariance, _ = gaussian
    relation, std = correlation(covariance)
    c = hermite_coefficients(lambda z: 2 * z + 1, mean, std)
    torch.testing.assert_close(c[:, 0], 2 * mean + 1)
    torch.testing.assert_close(transformed_covariance(c, c, relation), 4 * covariance)


def test_a_variable_without_spread_has_no_correlation():
    relation, std = correlation(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double())
    assert relation.tolist() == [[1.0, 0.0], [0.0, 0.0]] and std.tolist() == [2.0, 0.0]


def test_the_variance_of_outputs_by_hand():
    taps = torch.tensor([[[1.0, 2.0]]]).double()  # one output, one input, two taps
    kernel = tap_correlation((2,), 1.0)
    found = output_variance(taps, kernel, torch.tensor([[3.0]]).double())
    assert float(found) == pytest.approx(3 * (1 + 4 + 2 * 2 * np.exp(-1)))


def reading(covariance: torch.Tensor, mean: torch.Tensor, outputs: int = 3) -> Reading:
    taps = torch.randn(outputs, len(mean), 1, generator=torch.Generator().manual_seed(1)).double()
    zero = torch.zeros(outputs).double()
    one = torch.ones(1, 1).double()
    return Reading("reader", taps, one, mean, covariance, mean, covariance, covariance, zero, zero)


def test_with_nothing_removed_the_readout_is_the_identity(gaussian):
    mean, covariance, _ = gaussian
    matrix, gain, shift = read_back(reading(covariance, mean), ridge=0)
    torch.testing.assert_close(matrix, torch.eye(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gain, torch.ones(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(shift, torch.zeros(3).double(), rtol=0, atol=1e-6)


def test_duplicated_channels_are_read_back(gaussian):
    mean, covariance, _ = gaussian
    twice = torch.tensor([0, 1, 2, 3, 0, 2])
    both = reading(covariance[twice][:, twice], mean[twice])
    keep = explaining_channels([both], 4)
    assert {int(twice[k]) for k in keep} == {0, 1, 2, 3}
    matrix, gain, shift = read_back(both.narrowed(slice(None), keep), ridge=0)
    wanted = (twice[:, None] == twice[keep]).double()
    torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(gain, torch.ones(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(shift, torch.zeros(3).double(), rtol=0, atol=1e-5)


def test_the_readout_keeps_mean_and_variance_of_outputs(gaussian):
    mean, covariance, samples = gaussian
    whole = reading(covariance, mean)
    keep = torch.tensor([1, 3])
    matrix, gain, shift = read_back(whole.narrowed(slice(None), keep), max_gain=100)
    weight = whole.taps.squeeze(2)
    old = samples @ weight.T
    new = gain * (samples[:, keep] @ (weight @ matrix).T) + shift
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(new.std(0), old.std(0), rtol=0.02, atol=0.02)


def test_without_spread_the_shift_carries_the_mean():
    mean = torch.tensor([1.0, -2.0]).double()
    still = reading(torch.zeros(2, 2).double(), mean)
    matrix, gain, shift = read_back(still.narrowed(slice(None), torch.tensor([0])))
    assert not matrix.any() and torch.equal(gain, torch.ones(3).double())
    torch.testing.assert_close(shift, still.taps.sum(2) @ mean)


def test_moments_that_are_not_finite_are_refused():
    bad = torch.full((2, 2), torch.nan).double()
    with pytest.raises(IntrafuseError, match=r"moments must be finite.*reader"):
        read_back(reading(bad, torch.zeros(2).double()))


def test_measured_moments_agree_with_numpy():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    data = [torch.randn(5, 2, 6, 6) for _ in range(3)]
    graph = trace(model, data[0])
    found = Calibration(model, data).readings(graph.groups[0], Weights.of(graph, model))["2.weight"]
    with torch.no_grad():
        h = torch.cat([model[:2](x).movedim(1, 0).flatten(1) for x in data], 1).double().numpy()
    covariance = np.cov(h, bias=True)
    for part in (found.old, found.new, found.cross):
        np.testing.assert_allclose(part.numpy(), covariance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.old_mean.numpy(), h.mean(1), rtol=1e-5, atol=1e-6)


def test_folded_and_unfolded_batch_norm_tell_the_same_means_and_variances():
    model, x = build("chain")
    graph = trace(model, x)
    plain, folded = Weights.of(graph, model), Weights.of(graph, model)
    fold_norms(folded)
    for group in graph.groups:
        for name, want in readings(group, Propagation(plain)).items():
            found = readings(group, Propagation(folded))[name]
            torch.testing.assert_close(found.old_mean, want.old_mean, rtol=1e-3, atol=1e-4)
            spread, wanted = found.old.diagonal(), want.old.diagonal()
            torch.testing.assert_close(spread, wanted, rtol=2e-3, atol=1e-4)


def test_the_first_layer_of_unit_inputs_is_exact():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    graph = trace(model, torch.zeros(2, 6))
    (found,) = readings(graph.groups[0], Propagation(Weights.of(graph, model))).values()
    with torch.no_grad():
        h = model[:2](torch.randn(400_000, 6)).double()
    torch.testing.assert_close(found.old_mean, h.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(found.old, h.T.cov(), rtol=0.05, atol=0.005)


OTHERS = [("analytic", "none"), ("calibration", "intra-fusion")]


@pytest.mark.parametrize(
    ("name", "how"), [*covering(NETWORKS, [("analytic", "folding")]), *covering(NETWORKS, OTHERS)]
)
def test_every_small_network_at_every_width(name, how):
    model, x = build(name)
    data, (source, transport) = [x], how
    for share in (0.1, 0.9) if transport == "folding" else (0.7,):
        method = Moment(source=source, transport=transport)
        plan = intrafuse.plan(model, x, channels=share, method=method, data=data)
        pruned = plan.apply(model)
        for parameter, tensor in pruned.state_dict().items():
            parameter = plan.graph.aliases.get(parameter, parameter)
            assert tuple(tensor.shape) == plan.shapes()[parameter]
            assert torch.isfinite(tensor).all() or not tensor.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, x = build("chain")
    pruned = intrafuse.prune(model.to(dtype), x.to(dtype), channels=0.5, method="moment").model
    assert {p.dtype for p in pruned.parameters()} == {dtype}


@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_dead_channels_and_negative_gamma(gamma):
    model, x = build("chain")
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight[:] = gamma
    for share in (0.5, 0.95):
        pruned = intrafuse.prune(model, x, channels=share, method="moment").model
        assert torch.isfinite(pruned(x)).all()


def test_statistics_that_are_not_finite_name_the_layer():
    model, x = build("chain")
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = torch.nan
    with pytest.raises(IntrafuseError, match=r"finite.*running_var"):
        intrafuse.prune(model, x, channels=0.5, method="moment")


def test_calibration_without_data_names_the_option():
    model, x = build("chain")
    with pytest.raises(IntrafuseError, match="--data"):
        intrafuse.prune(model, x, channels=0.5, method=Moment(source="calibration"))


def test_an_operator_without_a_rule_has_no_moments():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.asinh(self.a(x)))

    graph = trace(Odd(), torch.zeros(1, 4))
    propagation = Propagation(Weights.of(graph, Odd()))
    asinh = next(n for n in graph.program.nodes if "asinh" in n.name)
    assert propagation.of(asinh) is None


def test_trained_networks_keep_more_than_by_fusion(shared):
    from intrafuse.catalog.data import load_data
    from intrafuse.catalog.zoo import load_weights, resolve_model
    from intrafuse.study.evaluate import accuracy

    network = resolve_model("vgg11_bn")
    load_weights(network.model, shared / "models" / "vgg11_bn_cifar10.safetensors")
    images = load_data(f"cifar10:{shared / 'data' / 'cifar10'}", limit=200)
    kept = {
        method: accuracy(
            intrafuse.prune(
                network.model, network.example_inputs, channels=0.7, method=method
            ).model,
            images,
        )
        for method in ("intra-fusion", "moment")
    }
    assert kept["moment"] > 55 > 35 > kept["intra-fusion"]
