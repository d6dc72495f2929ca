"""Arguments of a wrong kind: one line that names the argument, from every public function."""

from __future__ import annotations

import inspect

import pytest
import torch
from networks import build
from torch import nn

import intrafuse
from intrafuse import Budget, IntrafuseError, Plan, Recipe
from intrafuse.allocation.timing import latency

MODEL, X = build("mlp")
PLAN = intrafuse.plan(MODEL, X, channels=0.5, method="select")
WRONG = [None, 3, -1, 1.5, "x", b"x", True, [0], ["x", 0], {"0": "x"}, {3: 0.1}, object(), print]
WRONG += [torch.zeros(2), nn.Linear(2, 2), float("nan"), iter([]), Plan, PLAN]
CALLS = {
    "trace": (intrafuse.trace, {"model": MODEL, "example_inputs": X}),
    "plan": (intrafuse.plan, {"model": MODEL, "example_inputs": X, "channels": 0.5}),
    "prune": (intrafuse.prune, {"model": MODEL, "example_inputs": X, "channels": 0.5}),
    "fuse": (intrafuse.fuse, {"models": [MODEL, build("mlp", 1)[0]], "example_inputs": X}),
    "fold": (intrafuse.fold_batchnorm, {"model": MODEL, "example_inputs": X}),
    "synthesise": (
        intrafuse.synthesise, {"model": MODEL, "example_inputs": X, "images": 4, "steps": 1}
    ),
    "latency": (latency, {"model": MODEL, "example_inputs": X, "runs": 4}),
    "apply": (lambda **given: PLAN.apply(**given), {"model": MODEL}),
    "Budget": (Budget, {"kind": "channels", "share": 0.5}),
    "Budget.of": (lambda **given: Budget.of(given), {"channels": 0.5}),
    "load": (intrafuse.load, {"folder": "nowhere", "model": MODEL}),
}  # fmt: skip
ALSO = {"apply": ["inplace"], "Budget.of": ["params"]}


def arguments_of(name):
    function, given = CALLS[name]
    named = inspect.signature(function).parameters
    return [n for n in (*given, *named, *ALSO.get(name, ())) if n not in ("given",)]


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in CALLS for argument in dict.fromkeys(arguments_of(name))],
)
def test_no_argument_raises_anything_else(name, argument):
    """Each either works or is refused in one line; at least one of the values is refused."""
    function, given = CALLS[name]
    refusals = 0
    for value in WRONG:
        if argument in ("importance", "progress") and callable(value):
            continue  # what a function of the caller raises is the caller's
        try:
            function(**{**given, argument: value})
        except IntrafuseError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            refusals += 1
    assert refusals


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("prune", {"include": [0]}, r"include must be a list of patterns; got \[0\]"),
        ("prune", {"exclude": 3}, "exclude must be a list of patterns; got 3"),
        ("prune", {"exclude": "x"}, r"exclude must be a list .*Remedy: exclude=\['x'\]"),
        ("prune", {"overrides": ["0"]}, r"overrides must be a mapping .*got \['0'\]"),
        ("prune", {"overrides": {"0": "x"}}, r"overrides\['0'\] must be a share"),
        ("prune", {"seed": "x"}, "seed must be a whole number; got 'x'"),
        ("prune", {"seed": 0.5}, "seed must be a whole number; got 0.5"),
        ("prune", {"progress": 3}, r"progress must be a function \(done, total\), or None; got 3"),
        ("prune", {"inplace": "no"}, "inplace must be True or False; got 'no'"),
        ("prune", {"data": 3}, "data must be an iterable of batches; got 'int'"),
        ("fuse", {"weights": ["a", "b"]}, "weights must be 2 numbers"),
        ("fuse", {"regularisation": "x"}, "regularisation must be finite"),
        ("synthesise", {"images": 2.5}, "images must be a whole number from 1; got 2.5"),
        ("load", {"folder": None}, "folder must be a path; got None"),
        ("apply", {"model": None}, "model must be a torch.nn.Module; got None"),
        ("Budget", {"kind": "x"}, "kind must be one of channels, params, macs, latency; got 'x'"),
    ],
)
def test_messages_name_the_argument(function, settings, message):
    call, given = CALLS[function]
    with pytest.raises(IntrafuseError, match=message):
        call(**{**given, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": None}, "folder must be a path; got None"),
        ({"architecture": 3}, "architecture must be a name, or None; got 3"),
        ({"arguments": 3}, "arguments must be a mapping"),
        ({"figures": [1]}, "figures must be a mapping"),
        ({"source_sha256": 3}, "source_sha256 must be 64 hexadecimal digits"),
        ({"plan": 3}, "plan must be a Plan, or None; got 'int'"),
        ({"pruned": 3}, "model must be a torch.nn.Module; got 3"),
    ],
)
def test_save_names_the_argument_and_writes_nothing(settings, message, tmp_path):
    given = {"folder": tmp_path / "net", "pruned": MODEL, **settings}
    with pytest.raises(IntrafuseError, match=message):
        intrafuse.save(**given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [{"out": None}, {"device": 3}, {"progress": 3}, {"workers": 3}, {"parallel": "x"},
     {"threads": 0}, {"retries": -1}, {"recipe": "x"}],
)  # fmt: skip
def test_factorize_names_the_argument_and_starts_nothing(settings, tmp_path):
    given = {"recipe": Recipe(scheme="whole", model="mlp"), "out": tmp_path / "run", **settings}
    with pytest.raises(IntrafuseError, match=r"(must be|needed)"):
        intrafuse.factorize(**given)
    assert not list(tmp_path.iterdir())
