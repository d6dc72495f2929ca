"""Fusing networks: known answers, different widths, repair, merging by moments, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from fusions import duplicated, permuted
from networks import NETWORKS, build, outputs, same_state
from torch import nn

import intrafuse
from intrafuse.catalog.zoo import resolve_model
from intrafuse.fusing.stack import stack
from intrafuse.graph import trace
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

X = torch.zeros(1, 4)


def linear(width: int = 8, inputs: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 3))


def noise(count: int = 64, seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))]


def assert_same(model: nn.Module, expected: nn.Module, x: torch.Tensor, to: float = 1e-4) -> None:
    torch.testing.assert_close(outputs(model, x), outputs(expected, x), rtol=to, atol=to)


# --- known answers ------------------------------------------------------------------------------


def test_known_channels_are_paired_and_averaged():
    a, b = linear(2), linear(2)
    a[0].weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    b[0].weight.data = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0.2]])
    for net in (a, b):
        net[0].bias.data.zero_()
    fused = intrafuse.fuse([a, b], X, weights=(3, 1)).model
    expected = torch.tensor([[1.0, 0, 0, 0.05], [0, 1, 0, 0]])
    torch.testing.assert_close(fused[0].weight.data, expected)
    readers = 0.75 * a[2].weight.data + 0.25 * b[2].weight.data.flip(1)
    torch.testing.assert_close(fused[2].weight.data, readers)


@pytest.mark.parametrize(
    ("name", "features"),
    [*((name, "weights") for name in NETWORKS), ("residual", "activations")],
)
def test_a_network_fuses_with_a_wider_copy_of_itself(name, features):
    model, x = build(name)
    wide = permuted(duplicated(model, x), x)
    how = dict(features=features, data=[torch.randn(16, *x.shape[1:])])
    fused = intrafuse.fuse([model, wide], x, **how)
    assert_same(fused.model, model, x)
    assert_same(intrafuse.fuse([wide, model], x, **how).model, model, x)
    assert all(w == (n, 2 * n, n) for w in fused.report.widths.values() for n in w[:1])


def test_fusing_with_ones_own_pruned_version_keeps_the_widths_of_the_first():
    model, x = build("residual")
    pruned = intrafuse.prune(model, x, channels=0.5, method="select").model
    for pair, widths in (((model, pruned), (8, 10, 10)), ((pruned, model), (4, 5, 5))):
        fused = intrafuse.fuse(pair, x).model
        assert (fused.stem.out_channels, fused.conv1.out_channels, fused.head.in_features) == widths
        assert torch.isfinite(outputs(fused, x)).all()
    assert_same(intrafuse.fuse([pruned, model], x, weights=(1, 0)).model, pruned, x)


@pytest.mark.parametrize("repair", [None, "batchnorm"])
def test_operators_in_place_and_functions_are_observed_as_modules_are(repair):
    class Functional(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.first, self.last = net[0], net[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = nn.functional.linear(x, self.first.weight, self.first.bias).relu_()
            return nn.functional.linear(h, self.last.weight, self.last.bias)

    nets, data = [linear(seed=seed) for seed in (0, 1)], noise()
    settings = {"features": "activations", "data": data, "repair": repair}
    fused = intrafuse.fuse(nets, X, **settings).model
    twin = intrafuse.fuse([Functional(net) for net in nets], X, **settings).model
    assert_same(twin, fused, data[0], 1e-6)


def test_the_models_passed_in_stay_as_they_were():
    models = [build("residual", seed)[0].train() for seed in (0, 1)]
    x = build("residual")[1]
    states = [{k: t.clone() for k, t in m.state_dict().items()} for m in models]
    for method in ("ot", "assignment", "moment"):
        how = dict(features="activations", data=[torch.randn(8, 3, 6, 6)], repair="batchnorm")
        fused = intrafuse.fuse(models, x, method=method, **how).model
        assert not {id(p) for p in fused.parameters()} & {
            id(p) for m in models for p in m.parameters()
        }
    for model, state in zip(models, states, strict=True):
        assert same_state(model, state) and all(m.training for m in model.modules())
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("regularisation", [0.0, 1e-3])
def test_entropic_transport_comes_near_the_exact_one(regularisation):
    a = linear()
    fused = intrafuse.fuse([a, permuted(a, X)], X, regularisation=regularisation).model
    assert_same(fused, a, noise()[0], to=1e-2)


# --- widths and moments -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ot", "moment"])
def test_the_wanted_widths_are_reached(method, tmp_path):
    nets = [resolve_model("mlp").model for _ in "ab"]
    x = torch.randn(2, 1, 8, 8)
    fused = intrafuse.fuse(nets, x, method=method, width=0.5)
    assert all(w[-1] == w[0] // 2 for w in fused.report.widths.values())
    intrafuse.save(tmp_path / "net", fused.model, plan=fused.plan, architecture="mlp")
    assert torch.equal(outputs(intrafuse.load(tmp_path / "net"), x), outputs(fused.model, x))
    name = next(iter(fused.report.widths))
    one = intrafuse.fuse(nets, x, method=method, width={name: 7})
    assert next(w[-1] for w in one.report.widths.values()) == 7


# What locks channels inside a network (one slope for all, padding) averages them there instead.
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"prelu", "option-a"}))
def test_the_union_computes_the_weighted_mean_of_the_outputs(name):
    (a, x), (b, _), (c, _) = (build(name, seed) for seed in (0, 1, 2))
    c = duplicated(c, x)
    nets = [Weights.of(trace(net, x), net) for net in (a, b, c)]
    union = install(a, stack(nets[0].graph, nets, (0.5, 0.3, 0.2)))
    if name == "autoencoder":  # what it puts out passes through a sigmoid at last
        union, a, b, c = (net[:-1] for net in (union, a, b, c))
    expected = 0.5 * outputs(a, x) + 0.3 * outputs(b, x) + 0.2 * outputs(c, x)
    torch.testing.assert_close(outputs(union, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["weights", "activations"])
def test_moments_merge_a_permuted_copy_into_the_same_function(features):
    for name in ("flat", "chain", "residual"):
        model, x = build(name)
        how = dict(features=features, data=[torch.randn(256, *x.shape[1:])], method="moment")
        fused = intrafuse.fuse([model, permuted(model, x)], x, samples=256, **how).model
        difference = (outputs(fused, x) - outputs(model, x)).norm() / outputs(model, x).norm()
        assert difference < 0.02, name


def test_moments_with_weights_one_and_zero_return_one_network():
    (a, x), (b, _) = build("residual"), build("residual", 1)
    assert_same(intrafuse.fuse([a, b], x, weights=(1, 0), method="moment").model, a, x)


# --- repair -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repair"),
    [*((name, "batchnorm") for name in NETWORKS), ("chain", "analytic"), ("mlp", "analytic")],
)
def test_repair_leaves_a_network_fused_with_its_copy(name, repair):
    model, x = build(name)
    data = [torch.randn(64, *x.shape[1:])]
    fused = intrafuse.fuse([model, permuted(model, x)], x, repair=repair, data=data).model
    assert_same(fused, model, x, to=2e-3)


def test_repair_restores_mean_and_deviation_of_every_layer():
    a, b = linear(seed=1), linear(seed=2)
    data = noise(512)

    def spread(net: nn.Sequential) -> torch.Tensor:
        return torch.stack([net[0](data[0]).std(0, correction=0), net[0](data[0]).mean(0)])

    plain = intrafuse.fuse([a, b], X).model
    fused = intrafuse.fuse([a, b], X, repair="batchnorm", data=data).model
    order = (b[0].weight / 1).detach()  # which channel of b each of a was paired with
    mean = 2 * plain[0].weight - a[0].weight
    pairs = torch.cdist(mean, order).argmin(1)
    torch.testing.assert_close(
        spread(fused), (spread(a) + spread(b)[:, pairs]) / 2, rtol=1e-3, atol=1e-3
    )
    assert spread(plain)[0].mean() < spread(fused)[0].mean()


# --- refusals -----------------------------------------------------------------------------------


def deeper() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def other_activation() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


CASES = {
    "another architecture": ([linear(), deeper()], {}, "network 2 .*: 2 "),
    "another activation": ([linear(), other_activation()], {}, "relu .*gelu"),
    "other outputs": ([linear(), nn.Sequential(*linear()[:2], nn.Linear(8, 4))], {}, "2 must keep"),
    "other widths": ([linear(), linear(6)], {"method": "assignment"}, r"equal widths \(at 0\)"),
    "no data": ([linear()] * 2, {"features": "activations"}, "needs unlabeled data"),
    "no data to repair": ([linear()] * 2, {"repair": "batchnorm"}, "needs unlabeled data"),
    "read once": ([linear()] * 2, {"data": iter(noise())}, "more than once"),
    "weights": ([linear()] * 2, {"weights": (1, 1, 1)}, "weights must be 2 numbers"),
    "negative": ([linear()] * 2, {"weights": (2, -1)}, "not negative"),
    "all zero": ([linear()] * 2, {"weights": (0, 0)}, "not all zero"),
    "not finite": ([linear()] * 2, {"weights": (1, float("nan"))}, "finite"),
    "one network": ([linear()], {}, "two networks or more"),
    "no list": (linear(), {}, "a list of networks"),
    "method": ([linear()] * 2, {"method": "mean"}, "method must be one of"),
    "reference": ([linear()] * 2, {"reference": 2}, "reference must be the index"),
    "samples": ([linear()] * 2, {"samples": 0}, "samples must be"),
    "width": ([linear()] * 2, {"width": 1.5}, "width must be"),
    "group": ([linear()] * 2, {"width": {"1": 3}}, "width names an unknown channel group"),
    "too wide": ([linear()] * 2, {"width": {"0": 9}}, "from 1 to 8"),
    "regularisation": ([linear()] * 2, {"regularisation": -1.0}, "regularisation must be"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case):
    models, how, message = CASES[case]
    with pytest.raises(IntrafuseError, match=message):
        intrafuse.fuse(models, X, **how)


def test_weights_that_are_not_finite_are_refused():
    bad = copy.deepcopy(linear())
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(IntrafuseError, match="finite"):
        intrafuse.fuse([linear(), bad], X)


@pytest.mark.parametrize("name", ["grouped", "separable", "option-a", "twice"])
def test_moments_with_repair_run_on_every_coupling(name):
    (a, x), (b, _) = build(name), build(name, 1)
    data = [torch.randn(32, *x.shape[1:])]
    how = dict(method="moment", features="activations", data=data, width=0.25)
    fused = intrafuse.fuse([a, b], x, repair="batchnorm", **how)
    assert torch.isfinite(outputs(fused.model, x)).all()
    assert all(w[-1] == int(0.75 * w[0]) for w in fused.report.widths.values())
