"""Latency: predictions between networks that were timed, and budgets of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import intrafuse
from intrafuse.allocation.latency import LatencyModel
from intrafuse.pruning.plan import Plan
from intrafuse.support.errors import IntrafuseError


class Clock:
    """A clock that layers move on as they run, by a rule."""

    def __init__(self):
        self.now, self.rule = 0.0, None

    def perf_counter(self):
        return self.now / 1000


CLOCK = Clock()


class Layer(nn.Linear):
    """A linear layer that takes a known time."""

    def forward(self, x):
        CLOCK.now += CLOCK.rule(self)
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch):
    """Let a rule say how many milliseconds each layer takes."""
    monkeypatch.setattr("intrafuse.allocation.timing.time", CLOCK)
    return lambda rule: setattr(CLOCK, "rule", rule)


def network():
    return nn.Sequential(Layer(8, 40), nn.ReLU(), Layer(40, 20), nn.ReLU(), Layer(20, 4))


def work(layer):
    return layer.weight.shape[0] * layer.weight.shape[1]


def macs(model):
    return sum(work(m) for m in model if isinstance(m, nn.Linear))


X = torch.zeros(1, 8)


def test_a_cost_for_each_mac_is_predicted_exactly(clock):
    clock(lambda layer: 0.2 + work(layer) / 1000)
    model = network()
    graph = intrafuse.trace(model, X)
    timed = LatencyModel(model, graph, graph.groups, X)
    for widths in ({}, {"0": 13}, {"0": 7, "2": 3}, {"2": 1}):
        small = {**graph.widths, **widths}
        expected = 0.6 + (8 * small["0"] + small["0"] * small["2"] + small["2"] * 4) / 1000
        assert timed.milliseconds(widths) == pytest.approx(expected, rel=1e-6)


def test_what_was_timed_is_told_as_it_was(clock):
    """A cliff no sum of work explains: near it predictions follow the networks that were timed."""
    clock(lambda layer: 10.0 if layer.weight.shape[0] > 29 else 1)
    model = network()
    graph = intrafuse.trace(model, X)
    timed = LatencyModel(model, graph, graph.groups, X)
    timed.observe({"0": 29})
    timed.observe({"0": 31})
    assert timed.milliseconds({"0": 29}) == pytest.approx(3)
    assert timed.milliseconds({"0": 31}) == pytest.approx(12)
    assert timed.milliseconds({}) == pytest.approx(12)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_budget_of_latency_is_met(clock, scope, share):
    clock(work)
    found = intrafuse.prune(network(), X, latency=share, method="select", scope=scope, floor=0)
    removed = 1 - macs(found.model) / macs(network())
    assert share <= removed + 1e-9 < share + 0.1
    told = found.plan.settings["latency"]
    assert told["before"] == pytest.approx(macs(network()))
    assert told["after"] == pytest.approx(macs(found.model))
    assert found.report.latency["after"].median == pytest.approx(macs(found.model))
    assert "latency (ms)" in str(found.report)


def test_a_network_that_gets_no_faster_is_refused(clock):
    clock(lambda layer: 1.0)
    with pytest.raises(IntrafuseError, match=r"cannot shed that share of latency.*at most 0\.0"):
        intrafuse.plan(network(), X, latency=0.5, method="select")


def test_a_plan_with_latency_is_saved_and_loaded(clock, tmp_path):
    clock(work)
    made = intrafuse.plan(network(), X, latency=0.5, method="select")
    made.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again.settings["latency"] == made.settings["latency"]


def test_a_real_clock():
    model = nn.Sequential(nn.Linear(8, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.Linear(2000, 4))
    x = torch.zeros(16, 8)
    found = intrafuse.prune(model, x, latency=0.3, method="select")
    times = found.plan.settings["latency"]
    assert 0 < times["after"] <= 0.7 * times["before"] + 1e-9
    assert np.isfinite([found.report.latency[n].median for n in ("before", "after")]).all()
    assert found.model[0].out_features < 2000
