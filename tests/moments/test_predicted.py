"""Widths by predicted damage: known curves and shares, then the laws of every budget."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build, covering, outputs
from torch import Tensor, nn

import intrafuse
from intrafuse import Budget, IntrafuseError
from intrafuse.allocation.budget import choose_widths, measure
from intrafuse.graph import trace
from intrafuse.methods import METHODS, Folding
from intrafuse.moments.damage import damage_by_width, stream_shares
from intrafuse.moments.propagate import Propagation
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

KINDS = ["channels", "params", "macs"]


def weights_of(model, x):
    weights = Weights.of(trace(model, x), model)
    fold_norms(weights)
    return weights


def damages(model, x):
    weights = weights_of(model, x)
    return damage_by_width(weights.graph.groups, weights)


def widths(model, x, **settings):
    return intrafuse.plan(model, x, scope="predicted", method="select", **settings).widths


def duplicated(times=2):
    """A perceptron whose second hidden layer holds each of 6 channels several times."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6 * times), nn.ReLU()),
        nn.Linear(6 * times, 4),
    )
    with torch.no_grad():
        for parameter in (model[2].weight, model[2].bias):
            parameter.copy_(parameter[:6].repeat(times, *[1] * (parameter.dim() - 1)))
    return model, torch.zeros(2, 5)


class Unknown(nn.Module):
    """No rule of moments describes what the second layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(torch.tan(self.a(x)))))


# --- known answers


@pytest.mark.parametrize("times", [2, 3])
def test_damage_is_nothing_while_only_duplicates_go(times):
    found = damages(*duplicated(times))["2"]
    assert len(found) == 6 * times + 1
    np.testing.assert_allclose(found[6:], 0, atol=1e-9)
    assert found[5] > 1e-3


def test_damage_of_independent_channels_by_hand():
    """Reader weights 1, 2, 3 over unit inputs: what is left after the best m, as noise to signal"""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    found = damages(model, torch.zeros(2, 3))["0"]
    np.testing.assert_allclose(found, [1e6, 5 / 9, 1 / 13, 0], atol=1e-9)


class Stream(nn.Module):
    """Layers add to a stream in another order than that of their definition."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.third = nn.Linear(4, 2), nn.Linear(6, 4)
        self.second, self.first = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.second(x)
        return self.head(y + self.third(x))


def test_shares_of_a_stream_by_hand():
    model = Stream()
    with torch.no_grad():
        for layer, size in ((model.first, 1.0), (model.second, 2.0), (model.third, 3.0)):
            layer.weight.fill_(size)
    found = stream_shares(Propagation(weights_of(model, torch.zeros(2, 6))))
    wanted = {"first.weight": 1, "second.weight": 4 / 5, "third.weight": 9 / 14, "head.weight": 1}
    assert found == pytest.approx(wanted)


def test_a_layer_without_spread_has_a_share_of_nothing():
    model = Stream()
    nn.init.zeros_(model.second.weight)
    found = stream_shares(Propagation(weights_of(model, torch.zeros(2, 6))))
    assert found["second.weight"] == 0 and found["first.weight"] == 1


def test_with_all_correlations_a_linear_network_has_its_exact_covariance():
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((5, 7, 6, 3)))).double()
    graph = trace(model, torch.zeros(2, 5).double())
    found = Propagation(Weights.of(graph, model), correlated=1.0)
    (last,) = graph.program.nodes[-1].all_input_nodes
    total, mean = torch.eye(5).double(), torch.zeros(5).double()
    for layer in model:
        total = layer.weight.detach() @ total @ layer.weight.detach().T
        mean = layer(mean).detach()
    torch.testing.assert_close(found.of(last).covariance, total, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.of(last).mean, mean, rtol=1e-6, atol=1e-8)


def test_without_correlations_only_variances_pass():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    graph = trace(model, torch.zeros(2, 4).double())
    (last,) = graph.program.nodes[-1].all_input_nodes
    first, second = (layer.weight.detach() for layer in model)
    alone = torch.diag((first @ first.T).diagonal())
    found = Propagation(Weights.of(graph, model), correlated=0.0).of(last)
    torch.testing.assert_close(found.covariance, second @ alone @ second.T, rtol=1e-6, atol=1e-8)


def test_the_descent_takes_what_costs_least_for_what_it_saves():
    """Two groups of equal size: widths by hand from made-up damage."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = trace(model, torch.zeros(1, 2))
    counted = Weights.of(graph, model).counted()
    damage = {"0": np.array([9.0, 5, 3, 1, 0]), "2": np.array([9.0, 4, 2, 0.5, 0])}

    def found(share, **settings):
        budget = Budget(kind="channels", share=share, scope="predicted", floor=0, **settings)
        sizes = lambda w: measure(graph, graph.resized(w), counted).channels  # noqa: E731
        kept = choose_widths(graph, list(graph.groups), {}, budget, sizes, damage)
        return kept["0"], kept["2"]

    path = [(4, 4), (4, 3), (3, 3), (3, 2), (2, 2), (1, 2), (1, 1)]
    assert [found(k / 8) for k in range(5)] == path[:5]
    assert found(5 / 8) in {(1, 2), (2, 1)} and found(6 / 8) == (1, 1)  # a tie
    assert found(0.5, overrides={"0": 0.25}) == (3, 1)


# --- laws


@pytest.mark.parametrize("name", NETWORKS)
def test_damage_never_falls_with_what_is_removed(name):
    model, x = build(name)
    found = damages(model, x)
    groups = trace(model, x).by_name
    for group, curve in found.items():
        assert len(curve) == groups[group].size + 1 and np.isfinite(curve).all()
        assert (np.diff(curve) <= 1e-9 * curve[0]).all(), group
        assert abs(curve[-1]) < 1e-6
    everything = stream_shares(Propagation(weights_of(model, x))).values()
    assert all(0 <= share <= 1 for share in everything)


@pytest.mark.parametrize(("name", "kind"), covering(NETWORKS, KINDS))
def test_the_budget_is_met_and_the_floor_stays(name, kind):
    model, x = build(name)
    for floor, share in ((0.1, 0.0), (0.3, 0.4)):
        made = intrafuse.plan(
            model, x, scope="predicted", floor=floor, method="select", **{kind: share}
        )
        sizes = {group.name: group.size for group in made.graph.groups}
        gone = 1 - sum(made.widths.values()) / sum(sizes.values())
        assert (gone if kind == "channels" else made.removed[kind]) >= share - 1e-9
        assert all(w >= max(1, floor * sizes[g] - 1e-9) for g, w in made.widths.items())
        assert bool(made.maps) == bool(share)


@pytest.mark.parametrize("multiple", [3, 4, 8])
def test_widths_are_multiples_or_whole(multiple):
    model, x = build("chain")
    found = widths(model, x, params=0.2, round_to=multiple)
    for group in trace(model, x).groups:
        width = found[group.name]
        assert width == group.size or width % multiple == 0


def test_overrides_decide_for_their_groups():
    model, x = build("residual")
    found = widths(model, x, params=0.4, overrides={"stem": 0, "conv1": 0.5})
    assert found["stem"] == 8 and found["conv1"] == 5


@pytest.mark.parametrize(
    ("name", "kind"), covering(["chain", "residual", "tied", "grouped"], KINDS)
)
def test_an_error_tells_the_most_that_can_be_removed(name, kind):
    model, x = build(name)
    with pytest.raises(IntrafuseError, match=f"cannot shed that share of {kind}") as info:
        widths(model, x, floor=0.4, **{kind: 0.999})
    most = float(re.search(r"at most (0\.\d+) can be removed", str(info.value))[1])
    found = widths(model, x, floor=0.4, **{kind: most})
    least = {g.name: -(-int(g.size * 400) // 1000) for g in trace(model, x).groups}
    assert found == least
    with pytest.raises(IntrafuseError, match="at most"):
        widths(model, x, floor=0.4, **{kind: most + 2e-4})


@pytest.mark.parametrize("size", [63, 130, 200])
def test_a_wide_group_can_shrink_to_its_floor(size):
    """Steps of several channels end at the floor all the same."""
    model = nn.Sequential(nn.Linear(3, size), nn.ReLU(), nn.Linear(size, 2))
    assert widths(model, torch.zeros(1, 3), channels=1 - 1 / size, floor=0) == {"0": 1}
    least = -(-size * 75 // 1000)
    assert widths(model, torch.zeros(1, 3), channels=1 - least / size, floor=0.075) == {"0": least}


def test_no_prunable_group():
    model, x = nn.Linear(4, 2), torch.zeros(1, 4)
    assert widths(model, x, channels=0) == {}
    with pytest.raises(IntrafuseError, match=r"at most 0\.0000"):
        widths(model, x, channels=0.1)


def test_duplicates_go_first():
    model, x = duplicated()
    for removed in range(1, 7):
        assert widths(model, x, channels=removed / 24) == {"0": 12, "2": 12 - removed}
    assert widths(model, x, channels=8 / 24)["0"] < 12


def test_groups_without_moments_go_last():
    torch.manual_seed(0)
    model, x = Unknown(), torch.zeros(1, 4)
    assert "a" not in damages(model, x)
    for removed in range(1, 8):
        assert widths(model, x, channels=removed / 16, floor=0) == {"a": 8, "b": 8 - removed}
    assert widths(model, x, channels=14 / 16, floor=0) == {"a": 1, "b": 1}
    assert widths(model, x, channels=0.5, exclude=["b"]) == {"a": 4, "b": 8}


@pytest.mark.parametrize(
    ("name", "method"), covering(["chain", "preactivation", "tied", "separable"], METHODS)
)
def test_every_method_takes_the_same_widths(name, method):
    model, x = build(name)
    pruned = intrafuse.prune(model, x, channels=0.4, scope="predicted", method=method)
    assert pruned.plan.widths == widths(model, x, channels=0.4)
    assert torch.isfinite(outputs(pruned.model, x)).all()


def test_less_damage_than_equal_shares():
    """The point of it: for a network with redundant layers, outputs stay closer."""
    model, x = duplicated(3)
    inputs = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    method, errors = Folding(features="writers"), []
    for scope in ("predicted", "uniform"):
        small = intrafuse.prune(model, x, channels=0.4, scope=scope, method=method).model
        errors.append(float(F.mse_loss(outputs(small, inputs), outputs(model, inputs))))
    assert errors[0] < 1e-9 < errors[1]
