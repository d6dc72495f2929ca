"""Slices of channels in every spelling: what is read stays what was read, or the channels stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import intrafuse


class Sliced(nn.Module):
    """Reads some of eight channels apart from all of them."""

    def __init__(self, part, width: int) -> None:
        super().__init__()
        self.part, self.at, self.size = part, 3, 2
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.c = nn.Linear(width, 2) if width else None

    def forward(self, x):
        h = self.a(x)
        part = self.part(self, h)
        return self.b(h) + part if self.c is None else self.b(h) + self.c(part)


# How a part is taken, and how many channels a layer of its own reads: 0 for none.
LITERAL = {
    "added": (lambda m, h: h[:, 3:4], 0),
    "a gate": (lambda m, h: torch.sigmoid(h[:, 3:4]), 0),
    "one": (lambda m, h: h[:, 3:4], 1),
    "two": (lambda m, h: h[:, 3:5], 2),
    "from the end": (lambda m, h: h[:, -5:-3], 2),
    "narrow": (lambda m, h: h.narrow(1, 3, 1), 1),
    "narrow from the end": (lambda m, h: h.narrow(1, -5, 1), 1),
    "tail": (lambda m, h: h[:, 3:], 5),
    "head": (lambda m, h: h[:, :3], 3),
    "steps inside": (lambda m, h: h[:, 1:7:2], 3),
    "quotients that agree at some sizes": (lambda m, h: h[:, (h.shape[1] - 2) // 2 :], 5),
    "a step that follows the size": (lambda m, h: h[:, :: h.shape[1] // 4], 4),
}


@pytest.mark.parametrize("name", LITERAL)
def test_positions_that_the_code_holds_as_numbers_keep_their_channels(name):
    model = Sliced(*LITERAL[name])
    x = torch.randn(3, 4)
    graph = intrafuse.trace(model, x)
    assert not any("a" in group.layers for group in graph.groups)
    assert intrafuse.plan(model, x, channels=0.0).widths == {}


FOLLOWING = {
    "every other": (lambda m, h: h[:, ::2], 4),
    "every other, from the second": (lambda m, h: h[:, 1::2], 4),
    "the second half": (lambda m, h: h[:, h.shape[1] // 2 :], 4),
    "the second quarter": (lambda m, h: h[:, h.shape[1] // 4 : h.shape[1] // 2], 2),
    "the last quarter": (lambda m, h: h[:, 3 * h.shape[1] // 4 :], 2),
    "attributes of its own": (lambda m, h: h[:, m.at : m.at + m.size], 2),
    "all, by an attribute of a layer": (lambda m, h: h[:, : m.c.in_features], 8),
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("method", ["select", "moment"])
def test_positions_that_follow_the_size_equal_the_masked_reference(name, method):
    model = Sliced(*FOLLOWING[name]).double()
    x = torch.randn(3, 4, dtype=torch.double)
    for seed in range(3):
        pruned = intrafuse.prune(
            model, x, channels=0.5, method=method, importance="random", seed=seed
        )
        assert pruned.model.a.out_features <= 4
        assert pruned.report.check.relative < 1e-12 < pruned.report.check.effect
