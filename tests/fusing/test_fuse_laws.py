"""Laws of fusion: a network and a permuted copy of itself fuse to the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from fusions import permuted
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FAMILIES, NETWORKS, build, covering, outputs
from random_networks import RandomNetwork
from random_networks import randomise as randomise_all
from torch import nn

import intrafuse
from intrafuse.catalog.zoo import resolve_model

HOW = [("ot", "weights"), ("assignment", "activations")]
METHODS = ("ot", "assignment")


def inputs_like(x: torch.Tensor, count: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *x.shape[1:], generator=generator).to(x)]


def assert_same(model: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(outputs(model, x), outputs(expected, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "how"), covering(NETWORKS, HOW))
def test_a_permuted_copy_fuses_to_the_same_function(name, how):
    method, features = how
    model, x = build(name)
    how = dict(method=method, features=features, data=inputs_like(x))
    fused = intrafuse.fuse([model, permuted(model, x)], x, **how)
    assert_same(fused.model, model, x)
    for distances in fused.report.distances.values():
        assert distances[0] is None and abs(distances[1]) < 1e-6


@pytest.mark.parametrize(("name", "how"), covering(FAMILIES, HOW))
def test_every_network_of_the_zoo_fuses_with_its_permuted_copy(name, how):
    method, features = how
    torch.manual_seed(0)
    resolved = resolve_model(name, **({} if name == "mlp" else {"width": 0.25}))
    model, (x,) = resolved.model, resolved.example_inputs
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    how = dict(method=method, features=features, data=inputs_like(x, 4))
    assert_same(intrafuse.fuse([model, permuted(model, x)], x, **how).model, model, x)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(HOW), st.integers(0, 1000))
def test_random_networks_fuse_with_their_permuted_copies(data, how, seed):
    model = randomise_all(RandomNetwork(data.draw), seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    how = dict(method=how[0], features=how[1], data=inputs_like(x))
    fused = intrafuse.fuse([model, permuted(model, x, seed)], x, seed=seed, **how)
    assert_same(fused.model, model, x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "preactivation"])
def test_copies_fuse_to_the_network(name, method):
    model, x = build(name)
    fused = intrafuse.fuse([copy.deepcopy(model) for _ in range(4)], x, method=method)
    assert_same(fused.model, model, x)


@pytest.mark.parametrize(("method", "features"), HOW)
@pytest.mark.parametrize("name", ["chain", "residual", "separable"])
def test_the_order_of_the_others_does_not_matter(name, method, features):
    (a, x), (b, _), (c, _) = (build(name, seed) for seed in (0, 1, 2))
    how = dict(method=method, features=features, data=inputs_like(x))
    expected = intrafuse.fuse([a, b, c], x, **how).model
    assert_same(intrafuse.fuse([a, c, b], x, **how).model, expected, x)
    assert_same(intrafuse.fuse([c, b, a], x, reference=2, **how).model, expected, x)


@pytest.mark.parametrize(("name", "method"), covering(NETWORKS, METHODS))
def test_weights_one_and_zero_return_one_network(name, method):
    (a, x), (b, _) = build(name), build(name, 1)
    assert_same(intrafuse.fuse([a, b], x, weights=(1, 0), method=method).model, a, x)
