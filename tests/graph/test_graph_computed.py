"""Layers whose weight is computed from parameters: weight norm, weight standardisation, scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_networks import randomise
from reference import mask_channels, mask_readers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import intrafuse


class Standardised(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.7).view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    """A linear layer whose weight is multiplied by a scale for each output."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(self.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


X = torch.randn(2, 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
COMPUTED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    "weight norm of a transposed convolution": lambda: parametrizations.weight_norm(
        nn.ConvTranspose2d(3, 8, 3), dim=1
    ),
    "standardised": lambda: Standardised(3, 8, 3, stride=1),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_outputs_of_a_computed_weight_go_with_the_parameters_behind_it(name):
    model = nn.Sequential(COMPUTED[name](), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = randomise(model, 0)
    plan = intrafuse.plan(model, X, channels=0.5, method="select")
    assert [*plan.widths.values()] == [4]
    pruned = plan.apply(model)
    torch.testing.assert_close(pruned(X), mask_readers(model, plan)(X))
    assert intrafuse.verify(model, plan).relative < 1e-12
    assert pruned[0].out_channels == 4 and pruned(X).sum().backward() is None
    read, written = (36, 64) if "transposed" in name else (16, 16)  # positions
    assert plan.before.macs == 9 * 3 * 8 * read + 8 * 2 * written


def test_inputs_of_a_standardised_weight_stay_and_those_of_a_scaled_one_go():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Standardised(8, 6, 3), nn.Conv2d(6, 2, 1))
    graph = intrafuse.trace(model.double(), X)
    assert [group.size for group in graph.groups] == [6]
    assert any("batch norm takes its statistics" in " ".join(g.locked) for g in graph.locked)
    scaled = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Scaled(8, 6), nn.Linear(6, 2)), 0)
    x = torch.randn(4, 5, dtype=torch.double)
    plan = intrafuse.plan(scaled, x, channels=0.5, method="select")
    assert sorted(plan.widths.values()) == [3, 4]
    torch.testing.assert_close(plan.apply(scaled)(x), mask_channels(scaled, plan)(x))


@pytest.mark.parametrize("method", ["intra-fusion", "folding", "moment"])
def test_channels_of_a_computed_weight_are_chosen_never_combined(method):
    model = nn.Sequential(COMPUTED["weight norm"](), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    plan = intrafuse.plan(model, X, channels=0.5, method=method)
    assert all(step.keep is not None for step in plan.maps)
    assert "computed" in " ".join(plan.graph.groups[0].chosen)


def test_a_weight_that_is_computed_from_an_input_is_refused():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x, weight):
            return self.out(F.linear(self.into(x), weight.relu()))

    graph = intrafuse.trace(Dynamic(), (torch.zeros(4, 5), torch.zeros(8, 8)))
    assert not graph.groups
