"""What `prune` and `Plan.apply` find out about their own result, and `verify` at other sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from networks import NETWORKS, build
from torch import nn

import intrafuse
from intrafuse.graph.rules import RULES
from intrafuse.pruning.verification import proof, verify
from intrafuse.pruning.verification.masked import selecting
from intrafuse.pruning.verification.proof import _parts
from intrafuse.support.errors import IntrafuseError

METHODS = ("select", "intra-fusion", "folding", "moment", "auto")


class Centred(nn.Module):
    """Subtracts a mean over channels, which has a rule that may be overlooked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.body(self.stem(x).relu()).relu()
        return self.head(y - y.mean(1, keepdim=True))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def wrong_rule(monkeypatch):
    """Let the graph forget that every channel contributes to a mean over channels."""

    def overlooking(scope, node):
        axes = scope.axes(node.args[0])
        return [*axes[:1], scope.table.atom(1), *axes[2:]]

    monkeypatch.setitem(RULES, "mean", overlooking)


@pytest.mark.parametrize("method", METHODS)
def test_prune_finds_out_a_wrong_rule_whatever_the_method(wrong_rule, method):
    model = Centred()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        IntrafuseError,
        match=r"masked original.*first differ at operator mean at test_check\.py:\d+.*"
        r"exclude=\['body'\]",
    ):
        intrafuse.prune(model, X, channels=0.5, method=method, inplace=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert intrafuse.prune(model, X, channels=0.5, method=method, check=False).report.check is None
    fine = intrafuse.prune(model, X, channels=0.5, method=method, exclude=["body"])
    assert fine.report.check.relative < 1e-6 < fine.report.check.effect


def test_apply_proves_its_result_where_it_is_given_inputs(wrong_rule, tmp_path):
    model = Centred()
    plan = intrafuse.plan(model, X, channels=0.5)
    plan.save(tmp_path / "plan.safetensors")
    for one in (plan, intrafuse.Plan.load(tmp_path / "plan.safetensors")):
        with pytest.raises(IntrafuseError, match=r"masked original.*exclude=\['body'\]"):
            one.apply(model, example_inputs=X, inplace=True)
        assert one.apply(model, example_inputs=X, check=False).body.out_channels == 4
        assert one.apply(model).body.out_channels == 4
    assert model.body.out_channels == 8


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_proves_itself_and_stays_as_it_was(name):
    model, x = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = intrafuse.prune(model, x, channels=0.5)
    assert torch.equal(torch.get_rng_state(), drawn)
    check = found.report.check
    assert check.relative < 1e-5 < check.effect and check.seconds > 0 and not check.note
    assert "Checked in" in str(found.report)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_nothing_removed_needs_no_run():
    model, x = build("chain")
    check = intrafuse.prune(model, x, channels=0.0).report.check
    assert check.relative is None and "nothing was removed" in str(check)


class Lively(nn.Module):
    """Draws noise at every call, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h + torch.rand_like(h))


def test_outputs_that_differ_from_call_to_call_are_not_compared():
    check = intrafuse.prune(Lively(), torch.randn(3, 4), channels=0.5).report.check
    assert check.relative is None and "differ from call to call" in check.note


def test_a_network_that_takes_no_noise_is_run_with_what_it_was_given():
    class Positive(nn.Module):
        """Takes roots, and refuses what has none."""

        def __init__(self, strict: bool) -> None:
            super().__init__()
            self.strict, self.a, self.b = strict, nn.Linear(4, 64), nn.Linear(64, 2)

        def forward(self, x):
            if self.strict and not torch.compiler.is_exporting():
                assert bool((x >= 0).all()), "no roots of these"
            return self.b(self.a(x.sqrt()).relu())

    for strict in (True, False):
        check = intrafuse.prune(Positive(strict), torch.ones(2, 4), channels=0.5).report.check
        assert check.relative < 1e-5 < check.effect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.double])
def test_rounding_is_no_fault(dtype):
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 3)).to(dtype)
    check = intrafuse.prune(model, torch.randn(4, 64, dtype=dtype), channels=0.25).report.check
    assert check.relative < 16 * torch.finfo(dtype).eps < check.effect


def test_a_sharp_decision_is_looked_at_in_double_precision():
    class Steep(nn.Module):
        """Rounding of single precision decides the sign of what is nearly zero."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 64), nn.Linear(64, 1)

        def forward(self, x):
            return torch.sigmoid(1e7 * self.b(self.a(x).relu()))

    torch.manual_seed(0)
    model = Steep()
    x = torch.randn(1, 4)
    with torch.no_grad():
        model.b.bias -= model.b(model.a(x).relu())[0]
    assert intrafuse.prune(model, x, channels=0.5).report.check.relative < 1e-4


def test_a_network_that_is_too_large_to_run_twice_is_checked_in_parts(wrong_rule, monkeypatch):
    model, x = build("chain")
    plan = selecting(intrafuse.plan(model, x, channels=0.5))
    assert [p.maps for p in _parts(model, plan, 2**40)] == [plan.maps]
    parts = list(_parts(model, plan, 0))
    assert [p.maps for p in parts] == [(step,) for step in plan.maps]
    monkeypatch.setattr(proof, "_free_memory", lambda device: 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert intrafuse.prune(model, x, channels=0.5).report.check.relative < 1e-5
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(IntrafuseError, match=r"masked original.*exclude=\['body'\]"):
        intrafuse.prune(Centred(), X, channels=0.5)


class Caching(nn.Module):
    """Branches on its configuration, as models of transformers do; the trace takes one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.width = 8
        self.mix, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.mix(x).relu()
        if self.config.use_cache:
            h = h + x.new_zeros(x.shape[0], 8)
        return self.b(self.a(h).relu())


def test_sizes_that_only_the_default_mode_insists_on_stay():
    model, x = Caching(), torch.randn(2, 4)
    graph = intrafuse.trace(model, x)
    assert list(graph.by_name) == ["a"]
    (locked,) = (group for group in graph.locked if "mix" in group.layers)
    assert any("in its default mode, at" in r and "test_check.py" in r for r in locked.locked)
    pruned = intrafuse.prune(model, x, channels=0.5)
    assert pruned.model(x).shape == (2, 3) and pruned.model.config.use_cache


def test_a_network_that_fails_only_by_itself_is_refused():
    class Moody(nn.Module):
        """Looks at its own width where nothing traces it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).relu()
            if not torch.compiler.is_exporting():
                assert h.shape[1] == 8, "eight are wanted"
            return self.b(h)

    with pytest.raises(
        IntrafuseError, match=r"cannot run: AssertionError: eight.*test_check.*exclude=\['a'\]"
    ):
        intrafuse.prune(Moody(), torch.randn(2, 4), channels=0.5)


# --- numbers that no traced operator reads ------------------------------------------------------


class TwoWays(nn.Module):
    """Divides by `chunk`; another way, which no trace takes, by a number that it holds."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.c, self.depth = hidden, 12
        self.into = nn.Conv2d(3, 2 * hidden, 1)
        self.inner = nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU())
        self.out = nn.Conv2d(3 * hidden, 5, 1)

    def forward(self, x):
        y = list(self.into(x).chunk(2, 1))
        return self.out(torch.cat([*y, self.inner(y[-1])], 1))

    def forward_split(self, x):
        y = list(self.into(x).split((self.c, self.c), 1))
        return self.out(torch.cat([*y, self.inner(y[-1])], 1))


def test_a_number_that_names_a_size_follows_it_on_paths_that_no_trace_took():
    pruned = intrafuse.prune(TwoWays(), X, channels=0.5)
    assert pruned.model.c == 8 and pruned.model.depth == 12
    torch.testing.assert_close(pruned.model.forward_split(X), pruned.model(X))
    assert pruned.report.unclear == ()


def test_a_number_that_names_two_sizes_stays_and_is_reported():
    pruned = intrafuse.prune(TwoWays(), X, channels=0.5, exclude=["inner.0"])
    assert pruned.model.c == 16 and pruned.report.unclear == ("c",)
    assert "may stand for several sizes: c" in " ".join(str(pruned.report).split())


def test_a_number_that_is_read_for_something_else_stays():
    class Repeating(nn.Module):
        """Runs its body as often as it has channels."""

        def __init__(self) -> None:
            super().__init__()
            self.times = 6
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x):
            for _ in range(self.times):
                x = self.b(self.a(x).relu())
            return self.c(x)

    pruned = intrafuse.prune(Repeating(), torch.randn(2, 4), channels=0.5)
    assert pruned.model.times == 6 and pruned.model.a.out_features == 3


# --- verify with other inputs -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 16, 16), (2, 3, 23, 17)])
def test_verify_takes_inputs_of_other_sizes_than_the_trace(shape):
    model = nn.Sequential(*(nn.Conv2d(c, d, 3) for c, d in ((3, 8), (8, 6), (6, 2))))
    plan = intrafuse.plan(model, torch.zeros(1, 3, 16, 16), channels=0.5, method="select")
    assert verify(model, plan, example_inputs=torch.randn(shape)).relative < 1e-5


def test_inputs_that_the_network_does_not_take_are_one_error():
    model, x = build("chain")
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    with pytest.raises(IntrafuseError, match="with these example inputs the network cannot run"):
        verify(model, plan, example_inputs=torch.randn(2, 1))
