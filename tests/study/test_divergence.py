"""Divergence of outputs and of layers: known answers and laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, build
from torch import nn

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate.divergence import KINDS, divergence, layer_divergence
from intrafuse.support.errors import IntrafuseError

DATA = load_data("digits", limit=60)


class Constant(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values.expand(len(x), -1)


def images_like(x: torch.Tensor):
    pixels = torch.randint(256, (12, *x.shape[1:]), dtype=torch.uint8)
    channels = x.shape[1]
    return replace(DATA.take(12), images=pixels, mean=(0.5,) * channels, std=(0.3,) * channels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_does_not_diverge_from_itself(kind):
    net = resolve_model("digits_resnet", width=0.25).model.train()
    found = divergence(net, net, DATA, kind=kind)
    assert found.shape == (60,) and float(found.abs().max()) < 1e-7 and net.training


@pytest.mark.parametrize(("kind", "expected"), [("logits", 5.0), ("cosine", 1.0)])
def test_known_distances(kind, expected):
    found = divergence(Constant(3.0, 0.0), Constant(0.0, 4.0), DATA, kind=kind)
    torch.testing.assert_close(found, torch.full((60,), expected, dtype=torch.double))


def test_probabilities_are_at_most_the_root_of_two_apart():
    found = divergence(Constant(99.0, 0.0), Constant(0.0, 99.0), DATA, kind="softmax")
    torch.testing.assert_close(found, torch.full((60,), 2.0**0.5, dtype=torch.double))


def test_batches_and_order_do_not_matter():
    a, b = (resolve_model("mlp").model for _ in "ab")
    found = divergence(a, b, DATA, batch_size=60)
    torch.testing.assert_close(divergence(a, b, DATA, batch_size=7), found)
    torch.testing.assert_close(divergence(b, a, DATA), found)


def test_an_unknown_kind_is_refused():
    with pytest.raises(IntrafuseError, match="kind"):
        divergence(Constant(1.0), Constant(1.0), DATA, kind="angle")


@pytest.mark.parametrize("name", [name for name in NETWORKS if build(name)[1].dim() == 4])
def test_layers_do_not_diverge_where_nothing_was_removed_or_lost(name):
    """`select` keeps what the first layers write; a plan that removes nothing keeps all."""
    model, x = build(name)
    data = images_like(x)
    plan = intrafuse.plan(model, x, channels=0.0, method="select")
    for found in layer_divergence(model, plan.apply(model), plan, data):
        assert found.error < 1e-9 and found.variance_ratio == pytest.approx(1), found


def test_the_first_layer_that_is_selected_is_exact_and_later_ones_are_not():
    torch.manual_seed(0)
    net = resolve_model("digits_resnet").model
    plan = intrafuse.plan(net, torch.zeros(1, 1, 8, 8), channels=0.5, method="select")
    found = layer_divergence(net, plan.apply(net), plan, DATA)
    assert found[0].layer == "bn1" and found[0].error < 1e-9
    assert found[-1].error > 0.01
    assert [f.layer for f in found][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]


@pytest.mark.parametrize("include", [None, ["*"]])
def test_a_plan_that_was_loaded_tells_the_same(include, tmp_path):
    net = resolve_model("digits_resnet", width=0.5)
    settings = {"channels": 0.5, "method": "select", "include": include}
    plan = intrafuse.plan(net.model, net.example_inputs, **settings)
    plan.save(tmp_path / "plan")
    small, loaded = plan.apply(net.model), intrafuse.Plan.load(tmp_path / "plan")
    found = layer_divergence(net.model, small, loaded, DATA, batch_size=25)
    assert found == layer_divergence(net.model, small, plan, DATA, batch_size=25)


def test_a_pruned_network_without_its_norms_is_refused():
    net = resolve_model("digits_resnet", width=0.5)
    plan = intrafuse.plan(net.model, net.example_inputs, channels=0.5)
    small = plan.apply(net.model)
    small.bn1 = nn.Identity()
    with pytest.raises(IntrafuseError, match=r"lacks tensors.*bn1\.running_mean.*plan\.apply"):
        layer_divergence(net.model, small, plan, DATA)


class Tied(nn.Module):
    """Calls one weight as two functions, and one layer that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.wide, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x.flatten(1)).relu_()
        for _ in range(2):
            h = nn.functional.linear(h, self.wide, self.bias).relu_()
        return self.head(h)


def test_functions_and_shared_weights_are_layers_too():
    torch.manual_seed(0)
    net = Tied().eval()
    plan = intrafuse.plan(net, torch.zeros(1, 1, 8, 8), channels=0.5, method="select")
    found = layer_divergence(net, plan.apply(net), plan, DATA)
    assert [f.layer for f in found] == ["first", "wide"] and found[0].error < 1e-9 < found[1].error


@pytest.mark.parametrize("method", ["folding", "moment"])
def test_merged_writers_are_compared_with_merged_channels(method):
    net = resolve_model("digits_resnet", width=0.5)
    plan = intrafuse.plan(net.model, net.example_inputs, channels=0.5, method=method)
    found = layer_divergence(net.model, plan.apply(net.model), plan, DATA)
    assert found[0].error < 1e-6 and found[0].variance_ratio == pytest.approx(1, abs=1e-3)
