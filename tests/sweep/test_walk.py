"""Networks that are walked through: what is seen, what is left behind, and when it fails."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, CalledTwice, build
from torch import Tensor, nn

import intrafuse
from intrafuse.graph import trace
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.weights import Weights
from intrafuse.sweep import activations
from intrafuse.sweep import walk as walking
from intrafuse.sweep.walk import measure, walk


def run(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in data]


def shown(model, networks, names, data, **kw):
    """List by name what each network shows, batch after batch."""
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in names}

    def keeping(name):
        return lambda *results: found[name].append(tuple(r.clone() for r in results))

    assert walk(model, networks, data, {name: keeping(name) for name in names}, **kw) == len(data)
    return found


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_shown_is_what_modules_of_both_networks_receive_and_return(name, before):
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    small = plan.apply(model)
    data = [torch.randn(n, *x.shape[1:]) for n in (4, 3)]
    names = [*plan.graph.layers, *(norm.mean for norm in plan.graph.norms)]
    weights = Weights.of(plan.graph, model), plan.weights(model)
    found = shown(model, weights, names, data, before=before)
    wanted: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for network in (model, small):
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        for module in network.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for key in names:
                if any(tensors[key] is t for t in own):
                    module.register_forward_hook(
                        lambda _, args, y, s=seen[key]: s.append(args[0] if before else y)
                    )
        run(network, data)
        for key in names:
            wanted[key].append(seen[key])
    for key in names:
        assert len(found[key]) == len(wanted[key][0])
        for pair, (a, b) in zip(found[key], zip(*wanted[key], strict=True), strict=True):
            torch.testing.assert_close(pair, (a, b), rtol=1e-5, atol=1e-5)


def test_what_is_returned_goes_on_in_the_first_network():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    graph = trace(model, torch.zeros(1, 2))
    weights, x, ends = Weights.of(graph, model), torch.randn(3, 2), []
    seen = {"0.weight": lambda a, b: a + 1, "2.weight": lambda a, b: ends.append((a, b))}
    assert walk(model, [weights, weights], [x], seen) == 1
    with torch.no_grad():
        assert torch.equal(ends[0][0], model[2]((model[0](x) + 1).relu()))
        assert torch.equal(ends[0][1], model(x))


class Writing(nn.Module):
    """Changes its input, a part of a result, and a buffer in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1.0)
        x.mul_(2.0)
        h = self.a(x)
        h.narrow(1, 0, 2).fill_(3.0)
        h[0].mul_(-1.0)
        return self.b(h.relu_() + self.calls)


def test_operators_write_where_the_code_of_the_network_does():
    model = Writing().train()
    x = torch.randn(3, 4)
    graph = trace(model, x)
    weights = Weights.of(graph, model)
    given = [x, x.clone()]
    found = shown(model, [weights, weights], ["a.weight", "b.weight"], given)
    assert model.calls.item() == 0 and model.training and torch.equal(*given)
    with torch.no_grad():
        for i, y in enumerate([model(x.clone()), model(x.clone())]):
            assert torch.equal(found["a.weight"][i][0], model.a(2 * x))
            assert torch.equal(found["b.weight"][i][0], y)
            assert torch.equal(found["b.weight"][i][1], y)


@pytest.mark.parametrize("depth", [4, 16])
def test_a_walk_holds_only_live_results(depth, monkeypatch):
    model = nn.Sequential(*(f for _ in range(depth) for f in (nn.Linear(6, 6), nn.ReLU()))).eval()
    x, held = torch.zeros(2, 6), []
    graph = trace(model, x)
    drop = walking._Pass.drop

    def counting(self, nodes):
        held.append(sum(n.op == "call_function" for n in self._known))
        drop(self, nodes)

    monkeypatch.setattr(walking._Pass, "drop", counting)
    walk(model, [Weights.of(graph, model)], [x], {})
    assert max(held) == 2


def test_a_batch_that_is_refused_is_named_and_nothing_stays_changed():
    model, x = build("chain")
    graph = trace(model.train(), x)
    state = torch.get_rng_state()
    with pytest.raises(IntrafuseError, match=r"refused batch 2 of the data.*channels.*Remedy"):
        walk(model, [Weights.of(graph, model)], [x, torch.zeros(2, 5, 6, 6)], {})
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_a_form_of_data_is_traced_once(monkeypatch):
    model, x = build("mlp")
    graph, traced = trace(model, x), []
    export = activations.export_program
    monkeypatch.setattr(activations, "export_program", lambda *a: (traced.append(a), export(*a))[1])
    for n in (len(x) + 1, len(x) + 2, len(x) + 1, len(x)):
        walk(model, [Weights.of(graph, model)], [torch.randn(n, *x.shape[1:])] * 2, {})
    assert len(traced) == 2


def test_moments_of_all_calls_of_a_layer_are_measured_together():
    model = CalledTwice().train()
    data = [torch.tensor([[1.0, 1.0], [3.0, 1.0]]), (torch.tensor([[5.0, 1.0]]),)]
    ordered = {"layer.weight": lambda x: x, "idle.weight": lambda x: x}
    weights = Weights.of(trace(model, data[0]), model)
    sums, batches = measure(model, weights, data, ordered)
    assert batches == 2 and [*sums] == ["layer.weight"] and sums["layer.weight"].additions == 4
    torch.testing.assert_close(sums["layer.weight"].mean(), torch.tensor([3.0, 3.0]).double())
    torch.testing.assert_close(sums["layer.weight"].variance(), torch.tensor([8 / 3, 1.0]).double())
    assert model.training
