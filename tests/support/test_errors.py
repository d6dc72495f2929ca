"""What bad input gets: one exception that names rule, value, layer and remedy; nothing changes."""

import json
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from networks import build, same_state
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import intrafuse
from intrafuse import IntrafuseError, MergeMap, Plan
from intrafuse.methods import Method

NAN, INF = float("nan"), float("inf")


@contextmanager
def refused(message, model=None):
    """Expect a refusal with this pattern in its message, and the model bit-equal after it."""
    state = {k: t.clone() for k, t in (model.state_dict() if model else {}).items()}
    flags = [m.training for m in model.modules()] if model else []
    with pytest.raises(IntrafuseError, match=message) as info:
        yield info
    assert "\n" not in str(info.value)
    if model is not None:
        same = {k: torch.nan_to_num(t, 7.25, 8.25, 9.25) for k, t in state.items()}
        now = {k: torch.nan_to_num(t, 7.25, 8.25, 9.25) for k, t in model.state_dict().items()}
        assert list(now) == list(same) and all(torch.equal(now[k], same[k]) for k in same)
        assert [m.training for m in model.modules()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def prune(model, x, **settings):
    return intrafuse.prune(model, x, inplace=True, **settings)


# --- budgets and settings


@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize("share", [1, 1.0, -0.1, 1.5, NAN, INF, "0.5", True, [0.5]])
def test_a_budget_outside_the_range_names_the_argument(kind, share):
    model, x = build("mlp")
    with refused(rf"{kind} must be a share in \[0, 1\); got .*0\.5 removes half", model):
        prune(model, x, **{kind: share})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one budget of channels, params, macs, latency must be given; got None"),
        (
            {"channels": 0.5, "params": 0.1},
            r"exactly one budget .*got \{'channels': 0\.5, 'params': 0\.1\}.*channels=0\.5",
        ),
        ({"channels": 0.5, "macs": 0.0}, "exactly one budget"),
        ({"channels": 0.5, "floor": 1.0}, r"floor must be a share in \[0, 1\); got 1\.0"),
        ({"channels": 0.5, "overrides": {"0": 1}}, r"overrides\['0'\] must be a share .*got 1"),
        (
            {"channels": 0.5, "scope": "all"},
            "scope must be one of uniform, global, predicted; got 'all'",
        ),
        ({"channels": 0.5, "round_to": 0}, "round_to must be a whole number from 1; got 0"),
        ({"channels": 0.5, "round_to": 2.5}, "round_to must be a whole number from 1; got 2.5"),
        ({"params": 0.99}, r"cannot shed that share of params; got 0\.99.*at most 0\.\d{4} can"),
        ({"channels": 0.5, "method": "intrafusion"}, "got 'intrafusion'.*mean intra-fusion"),
        ({"channels": 0.5, "method": 3}, "method must be a name or a method"),
        ({"channels": 0.5, "method": intrafuse.Plan}, "method must be a name or a method"),
        ({"channels": 0.5, "importance": "l3"}, "unknown importance; got 'l3'.*try l1"),
        ({"channels": 0.5, "importance": 3}, "importance must be a name or a function"),
        (
            {"channels": 0.5, "repair": "bn"},
            "repair must be one of analytic, batchnorm, synthetic, or None; got 'bn'",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    model, x = build("mlp")
    with refused(message, model):
        prune(model, x, **settings)


@pytest.mark.parametrize("argument", ["include", "exclude", "overrides"])
def test_a_pattern_without_a_match_gets_near_matches(argument):
    model, x = build("residual")
    wrong = {"konv1": 0.1} if argument == "overrides" else ["conv2", "konv1"]
    message = rf"pattern in {argument} matches no .*got 'konv1'.*near matches: conv1"
    with refused(message, model) as info:
        prune(model, x, channels=0.5, **{argument: wrong})
    assert info.value.usage


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_outside_a_list(argument):
    model, x = build("residual")
    with refused(rf"{argument} must be a list of patterns; got 'conv1'", model):
        prune(model, x, channels=0.5, **{argument: "conv1"})


def test_including_a_locked_group_tells_why_it_is_locked():
    model, x = build("residual")
    with refused(r"must keep its size: model output \(at head\)", model):
        prune(model, x, channels=0.5, include=["head"])


# --- numbers that are not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["stem.weight", "conv1.bias", "bn1.weight", "bn1.running_var", "short.1.running_mean"]
)
def test_weights_that_are_not_finite(name, bad):
    model, x = build("residual")
    method = "select" if bad == INF else "intra-fusion"
    plan = intrafuse.plan(model, x, channels=0.5, method=method)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[3] = bad
    message = rf"weights must be finite.* \(at {name}\)"
    with refused(message, model):
        prune(model, x, channels=0.5, method=method)
    with refused(message, model):
        plan.apply(model, inplace=True)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda g, c: torch.full((g.size,), NAN), r"must be finite, .*12 of 12.*\(at 0\); got nan"),
        (lambda g, c: torch.full((g.size,), -INF), "must be finite"),
        (lambda g, c: torch.ones(g.size - 1), r"one score for each of 12 .*\(at 0\); got \(11,\)"),
        (lambda g, c: torch.ones(g.size, 1), r"got \(12, 1\)"),
        (lambda g, c: [1.0] * g.size, "got 'list'"),
        (lambda g, c: None, "got 'NoneType'"),
    ],
)
def test_importance_that_is_no_importance(scores, message):
    model, x = build("mlp")
    with refused(message, model):
        prune(model, x, channels=0.5, importance=scores)


def test_negative_importance_cannot_be_mass():
    model, x = build("mlp")
    method = intrafuse.methods.IntraFusion(source_marginal="importance")
    with refused("not negative and not all zero", model):
        prune(model, x, channels=0.5, method=method, importance=lambda g, c: -torch.ones(g.size))


@dataclass(frozen=True)
class Wrong(Method):
    """A method that returns what it is told."""

    answer: object
    name: ClassVar[str] = "wrong"
    folds_batchnorm: ClassVar[bool] = False

    def __call__(self, group, scores, width, context):
        return self.answer(group.name, width, group.size)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda g, m, n: MergeMap.linear(g, torch.full((m, n), NAN)), r"must be finite.*\(at 3\)"),
        (lambda g, m, n: MergeMap.linear(g, torch.ones(m + 1, n)), r"map of 9 to 4 .*\(at 3\)"),
        (lambda g, m, n: MergeMap.linear(g, torch.ones(m, n - 1)), "map of 9 to 4 channels"),
        (lambda g, m, n: MergeMap.linear("x", torch.ones(m, n)), "map of 9 to 4 channels"),
        (
            lambda g, m, n: MergeMap.linear(g, torch.ones(m, n), torch.ones(m, n)),
            r"decode of a merge map must have the shape \(9, 4\) \(at 3\); got \(4, 9\)",
        ),
        (
            lambda g, m, n: MergeMap.select(g, n, torch.tensor([0, 1, 1, 2])),
            r"ascending channels below 9 \(at 3\); got \[0, 1, 1, 2\]",
        ),
    ],
)
def test_a_method_that_returns_a_wrong_map(answer, message):
    model, x = build("mlp")
    with refused(message, model):
        prune(model, x, channels=0.5, method=Wrong(answer))


def test_a_plan_with_numbers_that_are_not_finite():
    model, x = build("mlp")
    plan = intrafuse.plan(model, x, channels=0.5)
    encode = plan.maps[1].encode.clone()
    encode[0, 0] = INF
    plan = replace(plan, maps=(plan.maps[0], replace(plan.maps[1], encode=encode)))
    with refused(r"merge maps must be finite, but encode is not \(at 0\)", model):
        plan.apply(model, inplace=True)


# --- files


class Trap:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "empty", "missing", "folder"])
def test_a_file_that_is_no_plan(kind, tmp_path):
    path, trap = tmp_path / "plan", tmp_path / "trap"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(trap)))
    elif kind == "torch":
        torch.save({"maps": Trap(trap)}, path)
    elif kind == "text":
        path.write_text("{}")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with refused("must be a readable safetensors file that intrafuse wrote.*make the plan again"):
        Plan.load(path)
    assert not trap.exists()


def drop(key):
    return lambda data, tensors: data.pop(key)


def put(key, value):
    return lambda data, tensors: data.__setitem__(key, value)


def tensor(name, value):
    return lambda data, tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "damage",
    [
        *map(drop, ["format", "groups", "fold", "settings", "before", "after", "seconds", "graph"]),
        put("format", 99),
        put("graph", []),
        put("groups", ["0", "3", "6"]),
        put("groups", ["nothing", "0"]),
        put("groups", ["0", "3"]),
        put("before", {"channels": 1}),
        lambda data, tensors: data["graph"].pop("axes"),
        lambda data, tensors: data["graph"]["axes"].pop("0.weight"),
        lambda data, tensors: data["graph"]["sizes"].clear(),
        lambda data, tensors: tensors.pop("0/encode"),
        lambda data, tensors: tensors.pop("1/carry"),
        tensor("0/encode", torch.zeros(3)),
        tensor("0/encode", torch.full((4, 9), NAN)),
        tensor("0/decode", torch.zeros(4, 9)),
        tensor("0/keep", torch.tensor([0, 1, 2, 9])),
        tensor("0/nonsense:0.weight", torch.zeros(3)),
    ],
)
def test_a_damaged_plan(damage, tmp_path):
    model, x = build("mlp")
    plan = intrafuse.plan(model, x, channels=0.5)
    plan.save(tmp_path / "plan")
    with safe_open(tmp_path / "plan", "pt") as file:
        data = json.loads(file.metadata()["plan"])
    tensors = load_file(tmp_path / "plan")
    damage(data, tensors)
    save_file(tensors, tmp_path / "plan", {"plan": json.dumps(data)})
    with refused("plan|merge map"):
        Plan.load(tmp_path / "plan")


def test_a_safetensors_file_of_something_else(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "plan")
    with refused("that intrafuse wrote: KeyError: 'plan'"):
        Plan.load(tmp_path / "plan")


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    model, x = build("mlp")
    plan = intrafuse.plan(model, x, channels=0.5)
    (tmp_path / "file").touch()
    with refused("cannot be written"):
        plan.save(tmp_path / "file" / "plan")
    (tmp_path / "folder").mkdir()
    with refused("cannot be written"):
        plan.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


# --- models that cannot be traced


class Untraceable(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 6), nn.Linear(6, 2), forward

    def forward(self, x):
        return self.second(self.how(self.first(x)))


def branching(x):
    if x.sum() > 0:
        return x * 2
    return x


def counting(x):
    return x[: int(x.max().item())]


def leaving(x):
    return torch.from_numpy(np.sort(x.numpy()))


@pytest.mark.parametrize(
    ("forward", "operator", "line"),
    [
        (branching, "in operator aten.item", "if x.sum() > 0:"),
        (counting, "in operator aten.item", "return x[: int(x.max().item())]"),
        (leaving, "numpy", "return torch.from_numpy(np.sort(x.numpy()))"),
    ],
)
def test_an_untraceable_model_gets_operator_and_line(forward, operator, line, capfd):
    model = Untraceable(forward).train()
    with refused("cannot be traced by torch.export", model) as info:
        prune(model, torch.zeros(2, 4), channels=0.5)
    number = forward.__code__.co_firstlineno + 1
    for part in (operator, f"{__file__}:{number}: {line}", "control flow that depends on tensor"):
        assert part in str(info.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5), r"cannot be traced.*same reduction dim|mat1 and mat2"),
        (None, "cannot be traced"),
        ({"y": torch.zeros(2, 6)}, "cannot be traced"),
        ((torch.zeros(2, 6), torch.zeros(2, 6)), "cannot be traced"),
        (torch.zeros(0, 6), r"must hold a sample; got \[\(0, 6\)\]"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs, message):
    model, _ = build("mlp")
    with refused(message, model):
        prune(model, inputs, channels=0.5)
    with refused(message, model):
        intrafuse.fold_batchnorm(model, inputs, inplace=True)


# --- what needs data


def test_what_needs_data_names_the_option_that_gives_it():
    model, x = build("mlp")
    with refused("taylor.* needs data.*give data=", model):
        prune(model, x, channels=0.5, importance="taylor")
    with refused(r"repair of batch norm needs unlabeled data.*data= .*--data", model):
        prune(model, x, channels=0.5, repair="batchnorm")
    with refused("data gave no batch", model):
        prune(model, x, channels=0.5, repair="batchnorm", data=[])


def test_a_kwarg_that_does_not_exist_is_python_s_own_error():
    model, x = build("mlp")
    with pytest.raises(TypeError, match="latencies"):
        prune(model, x, channels=0.5, latencies=0.1)
    assert same_state(model, build("mlp")[0].state_dict())
