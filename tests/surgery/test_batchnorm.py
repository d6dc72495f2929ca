"""Folding batch norm leaves evaluation outputs unchanged, whatever stands before the norm."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build, covering, outputs, randomise, same_state
from torch import nn

from intrafuse import IntrafuseError, fold_batchnorm, trace
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

LAYERS = {
    "linear": (nn.Linear, (4, 6), {}, 1),
    "conv1d": (nn.Conv1d, (4, 6, 3), {}, 1),
    "conv2d": (nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": 1}, 2),
    "conv3d": (nn.Conv3d, (4, 6, 2), {}, 3),
    "grouped": (nn.Conv2d, (4, 6, 3), {"groups": 2}, 2),
    "depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4}, 2),
    "multiplier": (nn.Conv1d, (4, 8, 3), {"groups": 4}, 1),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2}, 1),
    "transposed2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "output_padding": 1}, 2),
    "transposed3d": (nn.ConvTranspose3d, (4, 6, 2), {}, 3),
    "transposed grouped": (nn.ConvTranspose2d, (4, 6, 3), {"groups": 2}, 2),
    "transposed depthwise": (nn.ConvTranspose1d, (4, 8, 3), {"groups": 4}, 1),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def unit(kind, *, bias=True, affine=True, eps=1e-5):
    """A layer and its norm, and an input for them."""
    layer, arguments, settings, spatial = LAYERS[kind]
    torch.manual_seed(0)
    layer = layer(*arguments, bias=bias, **settings)
    norm = NORMS[spatial](arguments[1], eps=eps, affine=affine)
    model = randomise(nn.Sequential(layer, norm, nn.ReLU())).eval()
    return model, torch.randn((3, 4) if kind == "linear" else (3, 4, *[5] * spatial))


def is_identity(norm):
    """Tell whether a batch norm passes its input: mean 0, variance 1 - eps, scale 1, shift 0."""
    one, zero = torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean)
    torch.testing.assert_close(norm.running_mean, zero)
    torch.testing.assert_close(norm.running_var + norm.eps, one)
    if norm.affine:
        torch.testing.assert_close(norm.weight.data, one)
        torch.testing.assert_close(norm.bias.data, zero)
    return True


@pytest.mark.parametrize(
    ("kind", "form"), covering(LAYERS, [(True, True), (True, False), (False, True), (False, False)])
)
def test_outputs_stay(kind, form):
    bias, affine = form
    model, x = unit(kind, bias=bias, affine=affine)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    expected = outputs(model, x)
    folded = fold_batchnorm(model, x)
    assert is_identity(folded[1]) and folded[0].bias is not None
    torch.testing.assert_close(outputs(folded, x), expected, atol=1e-5, rtol=1e-5)
    removed = fold_batchnorm(model, x, remove=True)
    assert isinstance(removed[1], nn.Identity)
    torch.testing.assert_close(outputs(removed, x), expected, atol=1e-5, rtol=1e-5)
    assert same_state(model, state) and not model[1].training
    torch.testing.assert_close(outputs(model, x), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_networks_stay(name):
    model, x = build(name)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    expected = outputs(model, x)
    folded = fold_batchnorm(model, x)
    torch.testing.assert_close(outputs(folded, x), expected, atol=1e-5, rtol=1e-5)
    again = fold_batchnorm(folded, x, remove=True)
    torch.testing.assert_close(outputs(again, x), expected, atol=1e-5, rtol=1e-5)
    assert same_state(model, state)


@pytest.mark.parametrize("kind", ["linear", "transposed grouped"])
@pytest.mark.parametrize("eps", [1e-12, 0.5, 1.0, 3.0])
def test_any_eps_is_folded(kind, eps):
    model, x = unit(kind, eps=eps)
    expected = outputs(model, x)
    for remove in (False, True):
        folded = fold_batchnorm(model, x, remove=remove)
        torch.testing.assert_close(outputs(folded, x), expected, atol=1e-5, rtol=1e-5)


def test_channels_with_a_scale_of_zero_become_their_shift():
    model, x = unit("conv2d")
    nn.init.zeros_(model[1].weight)
    folded = fold_batchnorm(model, x, remove=True)
    assert not folded[0].weight.any()
    torch.testing.assert_close(folded[0].bias.data, model[1].bias.data)
    torch.testing.assert_close(outputs(folded, x), outputs(model, x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "transposed2d"])
def test_the_type_of_numbers_stays(kind, dtype, tolerance):
    model, x = unit(kind, bias=False)
    model, x = model.to(dtype), x.to(dtype)
    folded = fold_batchnorm(model, x)
    assert {t.dtype for t in folded.state_dict().values()} == {dtype, torch.int64}
    torch.testing.assert_close(
        outputs(folded, x), outputs(model, x), atol=tolerance, rtol=tolerance
    )


def test_inplace_changes_the_model_itself():
    model, x = unit("conv2d", bias=False)
    expected = outputs(model, x)
    assert fold_batchnorm(model, x, inplace=True, remove=True) is model
    assert isinstance(model[1], nn.Identity) and isinstance(model[0].bias, nn.Parameter)
    torch.testing.assert_close(outputs(model, x), expected, atol=1e-5, rtol=1e-5)


def test_training_and_gradients_stay_as_they_were():
    model, x = unit("conv2d", bias=False)
    model.train()
    model[0].weight.requires_grad_(False)
    folded = fold_batchnorm(model, x)
    assert all(module.training for module in folded.modules())
    assert not folded[0].weight.requires_grad and not folded[0].bias.requires_grad
    assert folded[1].weight.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        folded[0](x).sum().backward()


def test_a_network_without_batch_norm_stays_bit_for_bit():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    folded = fold_batchnorm(model, torch.zeros(1, 4))
    assert folded is not model and same_state(folded, model.state_dict())


def test_norms_of_the_batch_itself_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(2, 3, 5, 5)
    folded = fold_batchnorm(model, x, remove=True)
    assert isinstance(folded[1], nn.BatchNorm2d) and same_state(folded, model.state_dict())


# --- what cannot be folded into one layer


class Wired(nn.Module):
    """Two layers and a norm, wired by a function."""

    def __init__(self, wire, channels=6, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, channels), nn.Linear(4, channels)
        self.norm, self.other = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
        self.head, self.wire = nn.Linear(channels, 2), wire
        randomise(self).eval()

    def forward(self, x):
        return self.head(self.wire(self, x))


def tie_weight(m):
    m.b.weight = m.a.weight


def tie_bias(m):
    m.b.bias = m.a.bias


def tie_scale(m):
    m.other.weight = m.norm.weight


SHARED = {
    "a norm after two layers": (lambda m, x: F.relu(m.norm(m.a(x))) + m.norm(m.b(x)), None),
    "a norm after a layer and a sum": (
        lambda m, x: m.norm(m.a(x)) + m.norm(m.a(x) * 2 + m.b(x)),
        None,
    ),
    "a layer before two norms": (lambda m, x: F.relu(m.norm(m.a(x))) + m.other(m.a(x)), None),
    "an output with two readers": (lambda m, x: (lambda y: m.norm(y).relu() - y)(m.a(x)), None),
    "a layer called with and without norm": (lambda m, x: m.norm(m.a(x)).relu() - m.a(x), None),
    "tied weights": (lambda m, x: m.norm(m.a(x)).relu() + m.b(x), tie_weight),
    "tied weights, two norms": (lambda m, x: m.norm(m.a(x)).relu() + m.other(m.b(x)), tie_weight),
    "a tied bias": (lambda m, x: m.norm(m.a(x)).relu() + m.b(x), tie_bias),
    "norms with one scale": (lambda m, x: m.norm(m.a(x)).relu() + m.other(m.b(x)), tie_scale),
    "a norm of a norm": (lambda m, x: m.other(m.norm(m.a(x))) + m.b(x), None),
    "a weight that is also a value": (lambda m, x: m.norm(m.a(x)) + m.a.weight.mean(), None),
    "a norm before the layer": (lambda m, x: m.norm(m.a(x)[:, :6].relu()) + m.b(x), None),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_shared_is_not_folded_wrongly(case):
    wire, tie = SHARED[case]
    model = Wired(wire)
    if tie is not None:
        tie(model)
    x = torch.randn(5, 4)
    expected = outputs(model, x)
    for remove in (False, True):
        folded = fold_batchnorm(model, x, remove=remove)
        torch.testing.assert_close(outputs(folded, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [4, 3])
def test_a_norm_over_another_dimension_is_not_folded(positions):
    """Batch norm acts on dimension 1; a linear layer writes the last one."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 4), nn.BatchNorm1d(positions), nn.ReLU()
    model = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * positions, 2))).eval()
    x = torch.randn(5, positions, 6)
    folded = fold_batchnorm(model, x, remove=True)
    torch.testing.assert_close(outputs(folded, x), outputs(model, x), atol=1e-5, rtol=1e-5)


def test_a_norm_before_the_activation_becomes_scale_and_shift():
    model, x = build("preactivation")
    folded = fold_batchnorm(model, x, remove=True)
    for name in ("bn1", "bn2", "bn3"):
        norm, old = folded.get_submodule(name), model.get_submodule(name)
        scale = old.weight / (old.running_var + old.eps).sqrt()
        torch.testing.assert_close(norm.weight, scale)
        torch.testing.assert_close(norm.bias, old.bias - old.running_mean * scale)
        torch.testing.assert_close(norm.running_mean, torch.zeros(8))


# --- statistics and refusals


def test_statistics_of_a_folded_layer():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, eps=0.5)).eval()
    norm = model[1]
    norm.weight.data, norm.bias.data = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([1.0, 0, -1])
    norm.running_mean, norm.running_var = torch.tensor([5.0, 6, 7]), torch.tensor([1.5, 0.0, 9])
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    fold_norms(weights)
    ((name, (mean, spread)),) = weights.statistics.items()
    assert name == "0.weight"
    torch.testing.assert_close(mean, torch.tensor([1.0, 0, -1]))
    torch.testing.assert_close(spread, torch.tensor([2.0 * 0.75**0.5, 0, 0]))


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_those_of_what_the_layer_computes(affine):
    """Where the running statistics are exact, so are mean and deviation of the folded layer."""
    model, x = unit("conv2d", affine=affine)
    model[1].train().momentum = None
    model[1].reset_running_stats()
    with torch.no_grad():
        model(x)
    model.eval()
    weights = Weights.of(trace(model, x), model)
    fold_norms(weights)
    mean, spread = weights.statistics["0.weight"]
    y = outputs(fold_batchnorm(model, x)[0], x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(y.std(1), spread, atol=1e-5, rtol=1e-4)


def test_numbers_that_are_not_finite_are_refused():
    model, x = unit("conv2d")
    model[1].running_var[2] = float("nan")
    with pytest.raises(IntrafuseError, match=r"finite.* \(at 1.running_var\)"):
        fold_batchnorm(model, x, inplace=True)
    assert torch.isfinite(model[0].weight).all() and torch.isnan(model[1].running_var[2])
