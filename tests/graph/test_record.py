"""The light record of a model's operators, and how often a trace runs the model's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import NETWORKS, build
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from intrafuse import IntrafuseError, trace
from intrafuse.graph.export import export_program, record
from intrafuse.graph.rules import operator_name
from intrafuse.graph.sizes.compare import calls, numbers

Code = Callable[[nn.Module, Tensor], Tensor]
RUNS: Counter[str] = Counter()


class Own(nn.Module):
    """Two layers, and code of one's own."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def branches(net: nn.Module, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.second(torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,)))


def regions(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.second(net.first(x))
    with torch.no_grad():
        return y.float() * 2


def mapped(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(torch.vmap(lambda row: row.sin() + 1)(net.first(x)))


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = net.first(x).relu_().unsqueeze_(0).add_(1)
    parts = [part.squeeze_(0) for part in y.chunk(2, -1)]
    return net.second(torch.cat(parts, -1).t_().t_())


def constants(net: nn.Module, x: Tensor) -> Tensor:
    width = torch.tensor(float(x.shape[1]))
    if width > 3:  # a number that is known
        x = x * width.item() + torch.tensor([1.0, 2.0, 3.0, 4.0])
    return net.second(net.first(x) + torch.from_numpy(np.ones(8, np.float32)))


def several(net: nn.Module, x: Tensor) -> Tensor:
    left, right = net.first(x).split([3, 5], -1)
    best, places = torch.max(left, 1)
    outer = torch.einsum("bi,bj->bij", left, right).flatten(1)[:, 1::2]
    return outer.sum(1) + best + places


CODE = {
    code.__name__: code for code in (branches, regions, mapped, in_place, constants, several)
} | {"checkpoint": lambda net, x: net.second(checkpoint(net.first, x, use_reentrant=False))}


def read(nodes: list[Node]) -> list[tuple[str, list[torch.Size], tuple[float, ...]]]:
    """List what a comparison of operators reads."""
    return [
        (
            operator_name(node),
            [v.shape for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)],
            numbers(node),
        )
        for node in calls(nodes)
        for value in [node.meta.get("val")]
    ]


@pytest.mark.parametrize("name", CODE)
def test_the_record_has_the_operators_shapes_and_numbers_of_an_export(name: str) -> None:
    model, x = Own(CODE[name]).eval(), torch.ones(3, 4)
    exported = [*export_program(model, (x,)).graph.nodes]
    assert read(record(model, (x,))) == read(exported)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_recorded_as_it_is_exported(name: str) -> None:
    model, x = build(name)
    assert read(record(model, (x,))) == read([*export_program(model, (x,)).graph.nodes])


def by_numbers(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(net.first(x))[: int(x.sum().item())]


def fails(net: nn.Module, x: Tensor) -> Tensor:
    return net.second(net.first(x).view(7, -1))


@pytest.mark.parametrize("code", [by_numbers, fails])
def test_the_record_fails_with_the_error_of_the_export(code: Code) -> None:
    model, x = Own(code).eval(), torch.ones(3, 4)
    with pytest.raises(IntrafuseError) as expected:
        export_program(model, (x,))
    with pytest.raises(IntrafuseError) as error:
        record(model, (x,))
    assert str(error.value) == str(expected.value)


def test_a_record_stops_where_it_is_told_and_takes_its_hooks_off() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def stop(graph: torch.fx.Graph) -> None:
        if len(calls(graph.nodes)) == 2:
            raise KeyError("enough")

    with pytest.raises(IntrafuseError) as error:
        record(model, (torch.ones(3, 4),), each=stop)
    assert isinstance(error.value.__cause__, KeyError)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert len(calls(record(model, (torch.ones(3, 4),)))) == 3


def test_while_a_model_is_recorded_the_numbers_of_its_constants_can_be_read() -> None:
    seen: list[float] = []

    def look(graph: torch.fx.Graph) -> None:
        seen[:] = [n for node in graph.nodes if node.op == "call_function" for n in numbers(node)]

    model, x = Own(constants).eval(), torch.ones(3, 4)
    record(model, (x,), each=look)
    assert {1.0, 2.0, 3.0, 4.0} <= {*seen} and all(type(number) is float for number in seen)


class Counted(nn.Linear):
    """A layer that counts its runs, of all copies together."""

    def forward(self, input: Tensor) -> Tensor:
        RUNS["layer"] += 1
        return super().forward(input)


class Attention(nn.Module):
    """Attention whose heads the code takes from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(16, 48), Counted(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


def runs_of_each_layer(depth: int) -> float:
    RUNS.clear()
    trace(nn.Sequential(*(Attention() for _ in range(depth))), (torch.zeros(2, 5, 16),))
    return RUNS["layer"] / depth


def test_deep_networks_are_run_no_more_often_than_shallow_ones() -> None:
    assert runs_of_each_layer(8) <= runs_of_each_layer(2) <= 5


class Fixed(nn.Module):
    """Many layers, of which the code knows the width of one."""

    def __init__(self, where: int) -> None:
        super().__init__()
        self.where = where
        self.layers = nn.ModuleList([nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(12))])
        self.last = Counted(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = x + torch.tensor([float(x.shape[1])]) if i == self.where else x.relu()
        return self.last(x * 2)  # a number, so that sizes are tried


@pytest.mark.parametrize("where", [0, 6, 12])
def test_the_search_for_a_culprit_runs_the_rest_of_the_model_a_few_times(where: int) -> None:
    RUNS.clear()
    graph = trace(Fixed(where), (torch.zeros(3, 4),))
    locked = {group.name: group.locked for group in graph.locked}
    assert locked[f"layers.{where}"] == ("the code fails where its size is another",)
    assert len(graph.groups) == 12
    assert RUNS["layer"] <= 4
