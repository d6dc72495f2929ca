"""LSTM, GRU and plain RNN: what is coupled, what is refused, and masked references."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import randomise
from reference import mask_readers, mask_writers
from torch import nn

import intrafuse

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Tagger(nn.Module):
    """Read a sequence; answer from every step and from the last states."""

    def __init__(self, kind: str, hidden: int = 8, **settings) -> None:
        super().__init__()
        self.into = nn.Linear(6, 10)
        self.body = LAYERS[kind](10, hidden, **settings)
        self.width = settings.get("proj_size", 0) or hidden
        self.head = nn.Linear(self.width * (2 if settings.get("bidirectional") else 1), 5)
        self.last = nn.Linear(self.width, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, states = self.body(torch.tanh(self.into(x)))
        end = states[0] if isinstance(states, tuple) else states
        return self.head(y), self.last(end[-1])


class Unrolled(nn.Module):
    """Apply a cell step by step, as code does that looks at every state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.into, self.cell, self.head = nn.Linear(6, 10), CELLS[kind](10, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in self.into(x).relu().unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def assert_masked(model: nn.Module, x: torch.Tensor, share: float = 0.5, seed: int = 0) -> None:
    plan = intrafuse.plan(model, x, channels=share, method="select", importance="random", seed=seed)
    pruned = plan.apply(model)
    with torch.no_grad():
        for reference in (mask_readers(model, plan), mask_writers(model, plan)):
            torch.testing.assert_close(pruned(x), reference(x), rtol=1e-6, atol=1e-6)


def test_the_gates_of_a_unit_move_together():
    graph = intrafuse.trace(Tagger("lstm"), torch.zeros(4, 5, 6))
    slots = {(s.parameter, s.axis): s for s in graph.by_name["body"].slots}
    rows, columns = slots["body.weight_hh_l0", 0], slots["body.weight_hh_l0", 1]
    assert [block.offset for block in rows.blocks] == [0, 8, 16, 24] and rows.role == "writer"
    assert [block.offset for block in columns.blocks] == [0] and columns.role == "reader"
    assert {("head.weight", 1), ("last.weight", 1), ("body.bias_ih_l0", 0)} <= set(slots)


def test_all_layers_and_directions_keep_the_same_units_and_the_attribute_follows():
    model = Tagger("gru", num_layers=2, bidirectional=True).eval()
    before = copy.deepcopy(model.state_dict())
    plan = intrafuse.plan(model, torch.zeros(4, 5, 6), channels=0.5, method="select")
    body = plan.apply(model).body
    assert (body.hidden_size, body.input_size) == (4, 5)
    assert body.weight_ih_l1_reverse.shape == (12, 8) and body.weight_hh_l1.shape == (12, 4)
    assert all(a is b for a, b in zip(body._flat_weights, body.parameters(), strict=True))
    assert model.body.hidden_size == 8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_pruned_lstm_trains_and_is_loaded_again(tmp_path):
    model, x = Tagger("lstm", num_layers=2, proj_size=3).eval(), torch.randn(4, 5, 6)
    pruned = intrafuse.prune(model, x, channels=0.5, method="select")
    intrafuse.save(tmp_path / "small", pruned)
    again = intrafuse.load(tmp_path / "small", model=copy.deepcopy(model)).eval()
    torch.testing.assert_close(again(x), pruned.model(x), rtol=0, atol=0)
    optimiser = torch.optim.SGD(pruned.model.parameters(), 0.1)
    pruned.model.train()(x)[0].square().sum().backward()
    before = pruned.model(x)[0].detach()
    optimiser.step()
    assert (pruned.model(x)[0] - before).abs().max() > 1e-4
    assert pruned.model.body.proj_size == 1


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_that_is_unrolled_equals_its_masked_references(kind):
    model = randomise(Unrolled(kind), 0)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    assert {g.name for g in intrafuse.trace(model, x).groups} == {"into", "cell"}
    assert_masked(model, x)


def test_a_state_of_a_size_that_the_code_holds_as_a_number_locks_the_units():
    class Primed(Tagger):
        def forward(self, x):
            return self.head(self.body(self.into(x), torch.ones(1, x.shape[1], 8))[0])

    graph = intrafuse.trace(Primed("gru"), torch.zeros(4, 5, 6))
    assert [group.name for group in graph.groups] == ["into"]
    reasons = next(g.locked for g in graph.locked if g.name == "body")
    assert "number" in " ".join(reasons) and "test_recurrent.py" in " ".join(reasons)


def test_an_attribute_that_a_state_takes_its_size_from_follows():
    class Primed(Tagger):
        def forward(self, x):
            state = torch.ones(1, x.shape[1], self.body.hidden_size, dtype=x.dtype)
            return self.head(self.body(self.into(x), state)[0])

    model, x = randomise(Primed("gru"), 0), torch.randn(4, 5, 6, dtype=torch.double)
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    assert plan.widths == {"into": 5, "body": 4}
    torch.testing.assert_close(plan.apply(model)(x), mask_readers(model, plan)(x))


def test_states_that_the_model_takes_and_packed_sequences_stay():
    class Stated(Tagger):
        def forward(self, x, state):
            return self.head(self.body(self.into(x), state)[0])

    graph = intrafuse.trace(Stated("rnn"), (torch.zeros(4, 5, 6), torch.zeros(1, 5, 8)))
    assert [group.name for group in graph.groups] == ["into"]
    assert any("model input" in group.locked for group in graph.locked)


def test_the_units_of_projections_stay_more_than_these():
    graph = intrafuse.trace(Tagger("lstm", proj_size=7), torch.zeros(4, 5, 6))
    assert {group.size for group in graph.groups} == {10, 7}
    assert any("projections" in " ".join(group.locked) for group in graph.locked)


def test_duplicated_units_merge_without_loss():
    model, x = randomise(Tagger("lstm", hidden=4), 3), torch.randn(4, 5, 6, dtype=torch.double)
    wide = randomise(Tagger("lstm", hidden=8), 3)
    wide.into.load_state_dict(model.into.state_dict())
    for (name, small), large in zip(
        model.body.named_parameters(), wide.body.parameters(), strict=True
    ):
        rows = small.unflatten(0, (4, 4)).repeat_interleave(2, 1).flatten(0, 1)
        large.data = rows.repeat_interleave(2, 1) / 2 if name.startswith("weight_hh") else rows
    for small, large in ((model.head, wide.head), (model.last, wide.last)):
        large.weight.data, large.bias.data = small.weight.repeat_interleave(2, 1) / 2, small.bias
    torch.testing.assert_close(wide(x), model(x))
    merged = intrafuse.prune(wide, x, channels=0.5, method="folding", include=["body"])
    torch.testing.assert_close(merged.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["intra-fusion", "folding", "moment", "auto"])
def test_merging_methods_run(method):
    model, x = Tagger("gru", bidirectional=True).eval(), torch.randn(4, 5, 6)
    found = intrafuse.prune(model, x, channels=0.5, method=method).model(x)
    assert all(torch.isfinite(tensor).all() for tensor in found)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 1000))
def test_select_equals_the_masked_references(data, share, seed):
    kind = data.draw(st.sampled_from([*LAYERS]))
    options = {
        "num_layers": data.draw(st.integers(1, 3)),
        "bidirectional": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
    }
    if kind == "lstm":
        options["proj_size"] = data.draw(st.sampled_from([0, 3, 7]))
    if kind == "rnn":
        options["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    model = randomise(Tagger(kind, **options), seed)
    assert_masked(model, torch.randn(4, 5, 6, dtype=torch.double), share, seed)
