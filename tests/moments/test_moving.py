"""Operators that only move values: one table, and every rule that asks it knows them all."""

import pytest
import torch
from torch import nn

from intrafuse.graph import trace
from intrafuse.graph.rules import registry
from intrafuse.graph.rules.registry import CASTS, DROPOUTS, JOINS, LIFTS, SPLITS, VIEWS
from intrafuse.moments.propagate import RULES

TABLE = VIEWS | SPLITS | JOINS | DROPOUTS | LIFTS


@pytest.mark.parametrize("name", sorted(TABLE))
def test_whatever_moves_values_has_its_rules(name):
    assert name in registry.RULES
    # results of a split are described by `getitem`; an export has no dropout that gives a mask
    assert name in RULES or name in SPLITS | {"native_dropout"}


class Attention(nn.Module):
    """Attention by hand, whose queries are moved in one spelling or another before the scale."""

    def __init__(self, spelling):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.spelling = spelling

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        q, k, v = self.spelling(q), k.transpose(1, 2), v.transpose(1, 2)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda q: q.transpose(1, 2),
        lambda q: q.swapaxes(1, 2),
        lambda q: q.swapdims(1, 2).positive(),
        lambda q: q.moveaxis(1, 2).double().float(),
        lambda q: q.transpose(1, 2).view_as(q.transpose(1, 2)),
        lambda q: q.transpose(1, 2).expand_as(q.transpose(1, 2)),
        lambda q: torch.concatenate(q.transpose(1, 2).tensor_split(2, 1), 1),
    ],
)
def test_the_width_of_heads_shrinks_however_queries_are_moved(spelling):
    graph = trace(Attention(spelling).eval(), torch.zeros(2, 3, 8))
    usual = trace(Attention(lambda q: q.transpose(1, 2)).eval(), torch.zeros(2, 3, 8))
    assert set(graph.by_name) == set(usual.by_name) and "q#width" in graph.by_name
    scaled = [[(item.weight, item.exponent) for item in g.rescales] for g in (graph, usual)]
    assert scaled == [[("q.weight", 0.5)]] * 2


def test_casts_are_views_and_views_are_no_splits():
    assert CASTS < VIEWS and not VIEWS & (SPLITS | JOINS | DROPOUTS | LIFTS)
