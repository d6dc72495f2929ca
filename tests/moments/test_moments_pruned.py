"""Moments of a pruned network do not depend on where its operators were recorded.

The rules see the trace of the original network beside the tensors of the pruned one. What they
find must be what they find with a trace of the pruned network itself: a rule that reads a number
of the trace, where the graph reads a tree, finds something else.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from networks import build as build_network
from torch import Tensor, nn
from torch.fx import Node
from twin_networks import TWINS
from twin_networks import build as build_twins

import intrafuse
from intrafuse.graph import trace
from intrafuse.graph.axes import Product, Sum
from intrafuse.graph.sizes.compare import calls
from intrafuse.moments.propagate import RULES, Moments, Propagation
from intrafuse.moments.readers import readings
from intrafuse.moments.rules.shape import _border
from intrafuse.surgery.weights import Weights


def agree(model: nn.Module, x: Tensor, channels: float = 0.4) -> int:
    """Hold the moments of every operator against those of a new trace; count the known ones."""
    plan = intrafuse.plan(model, x, channels=channels, method="select")
    old = Propagation(plan.weights(model))
    smaller = plan.apply(model)
    graph = trace(smaller, x)
    new = Propagation(Weights.of(graph, smaller))
    one, other = (calls(p.program.nodes) for p in (old, new))
    assert len(one) == len(other)
    known = 0
    for before, after in zip(one, other, strict=True):
        a, b = old.of(before), new.of(after)
        assert (a is None) == (b is None), before
        if a is not None and b is not None:
            known += 1
            torch.testing.assert_close(a.mean, b.mean, msg=f"mean of {before}")
            torch.testing.assert_close(a.covariance, b.covariance, msg=f"covariance of {before}")
    return known


@pytest.mark.parametrize("name", NETWORKS)
def test_rules_read_the_sizes_of_the_pruned_network(name):
    model, x = build_network(name)
    assert agree(model, x) > 2


SPELLINGS = [
    (family, name)
    for family in ("halves", "means", "maxima", "flat", "shuffled", "stacked", "beside")
    for name in TWINS[family].spellings
]


@pytest.mark.parametrize("family, name", SPELLINGS, ids=[" ".join(pair) for pair in SPELLINGS])
def test_rules_read_the_sizes_of_the_pruned_network_in_every_spelling(family, name):
    models, x = build_twins(family)
    assert agree(models[name], x) > 2


class Scaled(nn.Module):
    """Queries and keys of layers of their own; the code divides by the root of their width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = q / q.shape[-1] ** 0.5
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Positions(nn.Module):
    """Shares of positions that are channels of other layers: parts of a sequence beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(5, 9), nn.Linear(7, 12), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        more = self.mix(y.transpose(1, 2)).transpose(1, 2)
        y = torch.cat([F.relu(y), torch.tanh(more)], 1)
        return self.leave(y).mean(1)


@pytest.mark.parametrize("factory", [Scaled, Positions])
def test_rules_read_numbers_that_follow_a_size(factory):
    torch.manual_seed(0)
    model = factory().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12 if factory is not Positions else 5)
    assert agree(model, x) > 2


BORDERS = [
    ("before the whole", 0, 0),
    ("between two parts", 4, 3),
    ("inside a part that stays", 6, 5),
    ("behind a block", 10, 9),
    ("inside what shrank", 2, None),
    ("inside a block", 11, None),
    ("behind the whole", 13, 11),
]


@pytest.mark.parametrize("what, at, wanted", BORDERS, ids=[name for name, *_ in BORDERS])
def test_borders_are_found_in_trees(what, at, wanted):
    tree = Sum((0, 1, Product((2, 3))))  # 4 + 3 + 2 x 3 positions; then 3 + 3 + ...
    old = {0: 4, 1: 3, 2: 2, 3: 3}
    new = {0: 3, 1: 3, 2: 2, 3: 3} if what != "inside a block" else {0: 3, 1: 3, 2: 2, 3: 2}
    if what == "behind the whole":
        new = {0: 3, 1: 3, 2: 1, 3: 5}
    assert _border(tree, at, old, new) == wanted


def test_a_width_of_one_is_no_axis_of_size_one():
    """What is pruned to one channel does not broadcast, as a gate of one channel does."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.gate, self.leave = nn.Linear(6, 4), nn.Linear(6, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(torch.sigmoid(self.gate(x)) * F.relu(self.enter(x)))

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 6)
    plan = intrafuse.plan(model, x, channels=0.75, method="select")
    assert plan.widths == {"enter": 1}
    weights = plan.weights(model)
    assert list(readings(plan.graph.groups[0], Propagation(weights))) == ["leave.weight"]


def test_a_rule_that_fails_costs_no_network(monkeypatch):
    """The user gets the weights of pruning without moments, and is told; tests fail."""

    def broken(self: Propagation, node: Node) -> Moments | None:
        raise AttributeError("'list' object has no attribute 'factors'")

    def misshapen(self: Propagation, node: Node) -> Moments | None:
        tree = self.axes(node)[-1]
        return Moments(tree, torch.zeros(1).double(), torch.zeros(1, 1).double())

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(9, 4)
    plain = intrafuse.prune(model, x, channels=0.5, method="folding").model
    for rule in (broken, misshapen):
        monkeypatch.setitem(RULES, "relu", rule)
        with pytest.warns(RuntimeWarning, match="the moment rule of operator relu .*failed"):
            found = intrafuse.prune(model, x, channels=0.5, method="moment").model
        torch.testing.assert_close(found(x), plain(x))
        with pytest.raises(RuntimeWarning, match="the moment rule of operator relu"):
            intrafuse.prune(model, x, channels=0.5, method="moment")
