"""Weights that hold handles: what loads, what does not, and what is kept of a change."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from intrafuse import IntrafuseError, MergeMap
from intrafuse.graph import trace
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.following import _Dependents

LOADED: Counter[str] = Counter()


class Far:
    """A handle that counts how often it is loaded."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self._tensor = name, tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def numel(self) -> int:
        return self._tensor.numel()

    def load(self) -> Tensor:
        LOADED[self.name] += 1
        return self._tensor.clone()


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net[1].running_mean.normal_()
    return net


def handles(model: nn.Module, **changes: Tensor) -> dict[str, Far]:
    LOADED.clear()
    return {name: Far(name, changes.get(name, t)) for name, t in model.state_dict().items()}


def test_looking_loads_nothing():
    model = network()
    graph = trace(model, torch.zeros(1, 3))
    weights = Weights.of(graph, model, handles(model))
    LOADED.clear()  # the norm was looked at: is it folded?
    assert "0.weight" in weights.state and "no" not in weights.state
    assert [*weights.state] == [*Weights.of(graph, model).state]
    assert len(weights.state) == len(weights.held)
    assert weights.counted() == Weights.of(graph, model).counted()
    assert weights.present(graph.groups[0].slots)
    copy = weights.snapshot().on_cpu().snapshot()
    assert not LOADED
    assert torch.equal(copy.state["0.weight"], model[0].weight) and LOADED["0.weight"] == 1
    assert torch.equal(copy.state["0.weight"], model[0].weight) and LOADED["0.weight"] == 2
    with pytest.raises(TypeError, match="does not support item assignment"):
        weights.state["0.weight"] = torch.ones(1)


def test_merged_and_folded_as_tensors_are():
    model = network()
    graph = trace(model, torch.zeros(1, 3))
    near, far = Weights.of(graph, model), Weights.of(graph, model, handles(model))
    merge_map = MergeMap.linear("0", torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))
    for weights in (near, far):
        fold_norms(weights)
        weights.merge(merge_map)
    assert near.sizes == far.sizes and near.state.keys() == far.state.keys()
    assert all(torch.equal(near.state[name], far.state[name]) for name in near.state)
    assert [*near.statistics] == [*far.statistics]


def test_what_is_kept_of_a_change_is_held_in_its_place():
    model = network()
    graph = trace(model, torch.zeros(1, 3))
    kept: dict[str, Far] = {}

    def keep(name: str, tensor: Tensor) -> Far:
        kept[name] = Far(name, tensor)
        return kept[name]

    weights = Weights.of(graph, model, handles(model), keep)
    tried = weights.snapshot()
    tried.merge(MergeMap.select("0", 6, torch.arange(3)))
    assert not kept  # a trial stays in memory
    weights.merge(MergeMap.select("0", 6, torch.arange(4)))
    assert {"0.weight", "0.bias", "3.weight"} <= kept.keys()
    assert all(weights.held[name] is far for name, far in kept.items())
    other = Weights.of(graph, model, handles(model))
    other.resume(kept, {"0": 4}, {})
    assert other.sizes == weights.sizes
    assert all(torch.equal(other.state[name], weights.state[name]) for name in weights.state)


def test_operators_follow_what_is_held():
    model = network()
    graph = trace(model, torch.zeros(1, 3))
    weights = Weights.of(graph, model, handles(model))
    before = weights.snapshot()
    LOADED.clear()
    assert _Dependents(graph).of_change(before, weights) == [] and not LOADED
    weights.put({"3.bias": torch.ones(2)})
    assert len(_Dependents(graph).of_change(before, weights)) == 1 and not LOADED


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("0.weight", torch.full((6, 3), torch.nan), "must be finite.*0.weight"),
        ("3.bias", torch.full((2,), torch.inf), "must be finite.*3.bias"),
        ("0.weight", torch.ones(6, 3).to(torch.float8_e4m3fn), "16 bits or more.*0.weight"),
        ("0.weight", torch.ones(3, 6), "shapes that the plan was made for.*0.weight"),
    ],
)
def test_the_errors_are_those_of_tensors(name, tensor, match):
    model = network()
    graph = trace(model, torch.zeros(1, 3))
    with pytest.raises(IntrafuseError, match=match):
        _ = Weights.of(graph, model, handles(model, **{name: tensor})).state[name]
