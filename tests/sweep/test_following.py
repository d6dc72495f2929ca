"""What stays known of a network while its groups are merged, and how often it is computed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from networks import NETWORKS, build
from torch import nn

import intrafuse
from intrafuse.methods.moment import Moment
from intrafuse.moments.propagate import Propagation
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_followed_equals_what_is_computed_anew(name):
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=0.5, method="intra-fusion")
    weights = Weights.of(plan.graph, model)
    followed = Propagation(weights)
    nodes = [node for node in plan.graph.program.nodes if node.op == "call_function"]
    for merge_map in plan.maps:
        weights.merge(merge_map)
        followed, anew = followed.at(weights), Propagation(weights)
        for node in nodes:
            found, wanted = followed.of(node), anew.of(node)
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                assert torch.equal(found.mean, wanted.mean)
                assert torch.equal(found.covariance, wanted.covariance)


def chain(depth: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [f for _ in range(depth) for f in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("source", ["analytic", "calibration"])
def test_operators_are_computed_a_few_times_whatever_the_depth(source, monkeypatch):
    kind = Propagation if source == "analytic" else Activations
    counts: Counter = Counter()
    compute = kind.compute

    def counting(self, node):
        counts[node.name] += node.op == "call_function"
        return compute(self, node)

    monkeypatch.setattr(kind, "compute", counting)
    most = []
    for depth in (4, 16):
        counts.clear()
        data = [torch.randn(8, 6)]
        intrafuse.plan(chain(depth), data[0], channels=0.5, method=Moment(source=source), data=data)
        most.append(max(counts.values()))
        assert sum(counts.values()) < 9 * 2 * depth
    assert most[0] == most[1]


def test_moments_of_groups_that_are_merged_are_freed():
    """All but those that operators of pending groups read, or may yet change."""
    model, x = chain(4), torch.randn(8, 6)
    graph = intrafuse.trace(model, x)
    weights = Weights.of(graph, model)
    names = [group.name for group in graph.groups]
    moments = Propagation(weights, frozenset(names))
    nodes = [node for node in graph.program.nodes if node.op == "call_function"]
    moments.of(nodes[-1])
    assert {*nodes} <= {*moments._known}
    for done in range(1, len(names) + 1):
        moments = moments.until(weights, frozenset(names[done:]))
        assert not {*nodes[: 2 * done - 1]} & {*moments._known}
        assert nodes[-1] in moments._known
        torch.testing.assert_close(
            moments.of(nodes[-1]).mean, Propagation(weights).of(nodes[-1]).mean
        )


def test_moments_of_tried_tensors_are_freed_when_nothing_needs_them():
    """A wider stream changes every operator of a network; not all results may stay in memory."""
    model, x = chain(12), torch.randn(8, 6)
    weights = Weights.of(intrafuse.trace(model, x), model)
    other = weights.snapshot()
    other.put({"0.weight": 2 * weights.state["0.weight"]})
    tried = Propagation(weights).trying(other)
    (output,) = weights.graph.program.nodes[-1].all_input_nodes
    found, wanted = tried.of(output), Propagation(other).of(output)
    assert found is not None and wanted is not None
    assert torch.equal(found.covariance, wanted.covariance)
    assert len(tried._known) < 4
