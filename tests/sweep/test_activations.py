"""Networks that are run operator by operator: the same numbers as their own code gives."""

from __future__ import annotations

import pytest
import torch
from attention_networks import TOKENS, Attention, Block, Classifier, Mlp
from networks import NETWORKS, build, covering
from random_networks import randomise
from torch import Tensor, nn

import intrafuse
from intrafuse.graph import trace
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations, Batches

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def last(graph):
    """The operator whose result a network returns."""
    (output,) = (node for node in graph.program.nodes if node.op == "output")
    return output.all_input_nodes[0]


def run(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in data]


@pytest.mark.parametrize(
    ("name", "method"), covering(NETWORKS, ["select", "moment", "intra-fusion"])
)
def test_results_are_those_of_the_network_bit_for_bit(name, method):
    """As it is and pruned, on batches of other sizes than the example."""
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=0.5, method=method)
    data = [torch.randn(n, *x.shape[1:]) for n in (5, 3, len(x))]
    batches = Batches(model, plan.graph, data)
    activations = Activations(Weights.of(plan.graph, model), batches)
    pruned = activations.at(plan.weights(model))
    for network, found in ((model, activations), (plan.apply(model), pruned)):
        for y, wanted in zip(found.of(last(plan.graph)), run(network, data), strict=True):
            assert torch.equal(y, wanted)


WRITINGS = [
    {"projection": "chunk", "view": "heads"}, {"projection": "split", "scores": "query"},
    {"projection": "unbind", "rotary": True}, {"view": "unflatten", "scores": "root of shape"},
    {"projection": "slices", "grouping": "expand"}, {"grouping": "interleave", "mask": "add"},
    {"scores": "einsum", "mask": "where"}, {"scores": "baddbmm", "mask": "fill"},
]  # fmt: skip


@pytest.mark.parametrize("writing", WRITINGS, ids=lambda kw: " ".join(map(str, kw.values())))
def test_attention_runs_at_the_sizes_of_the_pruned_network(writing):
    model = randomise(Classifier(Block(Attention(**writing), Mlp(24, 10, "swiglu"), "layer")), 1)
    plan = intrafuse.plan(model, TOKENS, channels=0.5, method="select")
    assert any("#" in name for name in plan.widths)
    data = [TOKENS, TOKENS.flip(0)]
    found = Activations(plan.weights(model), Batches(model, plan.graph, data)).of(last(plan.graph))
    assert found is not None
    for y, wanted in zip(found, run(plan.apply(model), data), strict=True):
        # the scale of products is one rounding off: the code computes it, the trace holds it
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_tried_is_not_kept():
    model, x = build("residual")
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    activations = Activations(Weights.of(plan.graph, model), Batches(model, plan.graph, [x]))
    end = last(plan.graph)
    before = activations.of(end)[0].clone()
    tried = activations.trying(plan.weights(model)).of(end)[0]
    assert torch.equal(tried, plan.apply(model)(x)) and not torch.equal(tried, before)
    assert torch.equal(activations.of(end)[0], before)


class Live(Activations):
    """Counts the results that are held at once."""

    most = 0

    def computed(self, node):
        super().computed(node)
        Live.most = max(Live.most, sum(n.op == "call_function" for n in self._known))


@pytest.mark.parametrize("depth", [4, 16])
def test_only_live_results_are_held(depth):
    """In a chain, those of two operators: what the next reads, and what it writes."""
    model = nn.Sequential(*(f for _ in range(depth) for f in (nn.Linear(6, 6), nn.ReLU()))).eval()
    x = torch.zeros(2, 6)
    graph = trace(model, x)
    Live.most = 0
    Live(Weights.of(graph, model), Batches(model, graph, [x])).of(last(graph))
    assert Live.most <= 2


def test_what_a_group_may_still_change_is_held():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.zeros(2, 6)
    graph = trace(model, x)
    data = Batches(model, graph, [x])
    weights = Weights.of(graph, model)
    relus = [node for node in graph.program.nodes if "relu" in node.name]
    waiting = Activations(weights, data, frozenset({"2"}))
    waiting.of(last(graph))
    assert relus[0] in waiting._known  # what the writer of the group reads
    settled = waiting.until(weights, frozenset())
    assert not {*relus} & {*settled._known}


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.a, self.function, self.b = nn.Linear(4, 6), function, nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def test_operators_that_change_their_input_leave_earlier_results():
    model = randomise(Between(lambda h: h.sigmoid().add_(1.0).mul_(h)), 0)
    x = torch.randn(3, 4, dtype=torch.double)
    graph = trace(model, x)
    activations = Activations(Weights.of(graph, model), Batches(model, graph, [x]))
    assert torch.equal(activations.of(last(graph))[0], model(x))
    assert torch.equal(activations.of(last(graph))[0], model(x))


def test_what_is_written_through_a_view_is_unknown_behind_it():
    """Alone, the reader would read the tensor as it was before."""

    def function(h):
        h.narrow(0, 0, 2).mul_(-3.0)
        return h.relu_()

    model = randomise(Between(function), 0)
    x = torch.randn(3, 4, dtype=torch.double)
    graph = trace(model, x)
    activations = Activations(Weights.of(graph, model), Batches(model, graph, [x]))
    with pytest.warns(RuntimeWarning, match="relu at .*writes into a part of what it reads"):
        assert activations.of(last(graph)) is None


def test_data_that_take_another_way_through_the_code_are_refused():
    model = Between(lambda h: h.relu() if len(h) > 2 else h.tanh())
    graph = trace(model, torch.zeros(2, 4))
    with pytest.raises(IntrafuseError, match=r"other operators on batch 2 .*Remedy: .*same form"):
        Batches(model, graph, [torch.zeros(2, 4), torch.zeros(3, 4)])
