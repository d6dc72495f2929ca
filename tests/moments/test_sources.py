"""Sources of moments and repairs without data: synthetic inputs, in Python and by command."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from networks import build, covering, outputs, same_state
from torch import nn
from typer.testing import CliRunner

import intrafuse
from intrafuse import IntrafuseError, MergeMap
from intrafuse.cli import app
from intrafuse.methods import METHODS, Auto, Method, Moment
from intrafuse.moments.sources import MomentSource
from intrafuse.moments.synthetic import synthesise
from intrafuse.pruning.repair import reestimate_batchnorm

NORM = nn.modules.batchnorm._BatchNorm
FEW = {"source": "synthetic", "images": 8, "steps": 2}
NORMED = ["chain", "residual", "dense", "conv1d", "conv3d", "mlp", "separable", "tied", "twice"]


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def without_norms():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.zeros(2, 4)


# --- synthetic moments


@pytest.mark.parametrize(("name", "kind"), covering(NORMED, [Moment, Auto]))
def test_synthetic_moments_on_small_networks(name, kind):
    model, x = build(name)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    pruned = intrafuse.prune(model, x, channels=0.5, method=kind(**FEW))
    assert outputs(pruned.model, x).shape == outputs(model, x).shape
    assert torch.isfinite(outputs(pruned.model, x)).all() and same_state(model, state)
    assert pruned.plan.settings["method"]["images"] == 8
    for module in (*model.modules(), *pruned.model.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("kind", [Moment, Auto])
def test_synthetic_inputs_are_made_once_and_serve_as_data(kind):
    """For all groups of a plan; and a user who makes them gets the same plan."""
    model, x = build("chain")
    seen = []
    made = intrafuse.plan(
        model, x, channels=0.5, method=kind(**FEW), seed=5,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen.count((1, 2)) == 1 and len(made.maps) == 3
    data = synthesise(model, x, images=8, steps=2, seed=5)
    same = intrafuse.plan(model, x, channels=0.5, method=kind(source="calibration"), data=data)
    for a, b in zip(made.maps, same.maps, strict=True):
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, b.tensors()[name])


def test_the_data_of_the_user_is_not_read():
    class Untouched:
        def __iter__(self):
            raise AssertionError("synthetic moments need no data")

    model, x = build("chain")
    intrafuse.plan(model, x, channels=0.5, method=Moment(**FEW), data=Untouched())


@pytest.mark.parametrize("settings", [{"method": Auto(**FEW)}, {"repair": "synthetic"}])
def test_the_seed_decides(settings, monkeypatch):
    model, x = build("mlp")
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        pruned = intrafuse.prune(model, x, channels=0.5, seed=seed, **settings)
        states.append(pruned.model.state_dict())
    assert same_state(pruned.model, states[2])
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items())
    assert any(not torch.equal(t, states[2][k]) for k, t in states[0].items())


def test_progress_counts_steps_then_groups():
    model, x = build("chain")
    seen = []
    intrafuse.prune(
        model, x, channels=0.5, method=Moment(**FEW), repair="synthetic",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    groups = [(k, 3) for k in (1, 2, 3)]
    assert seen[:5] == [(1, 2), (2, 2), *groups]
    assert seen[5:] == [(k, 60) for k in range(1, 61)]


@pytest.mark.parametrize("name", METHODS)
def test_progress_of_every_method(name):
    model, x = build("residual")
    seen = []
    intrafuse.prune(model, x, channels=0.5, method=name, progress=lambda *step: seen.append(step))
    groups = len(intrafuse.plan(model, x, channels=0.5).maps)
    assert seen == [(k, groups) for k in range(1, groups + 1)]


# --- repairs


@pytest.mark.parametrize(
    ("name", "method"),
    [("chain", "auto"), ("residual", "folding"), ("mlp", "select"), ("twice", "folding")],
)
def test_synthetic_repair_is_repair_on_synthetic_inputs(name, method):
    model, x = build(name)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    pruned = intrafuse.prune(model, x, channels=0.5, method=method, repair="synthetic", seed=2)
    assert same_state(model, state)
    plan = intrafuse.plan(model, x, channels=0.5, method=method, seed=2)
    data = synthesise(model, x, seed=2)
    same = reestimate_batchnorm(model, plan.apply(model), plan, data)
    assert same_state(pruned.model, same.state_dict())


def test_synthetic_repair_brings_statistics_back():
    """Those of a network that was trained on noise, measured on that noise."""
    model, x = build("residual")
    data = noise(512, 3, 6, 6)
    for module in model.modules():
        if isinstance(module, NORM):
            module.train().momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(data)
    model.eval()

    def off(net):
        seen = []
        handles = [
            m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
            for m in net.modules() if isinstance(m, NORM)
        ]  # fmt: skip
        outputs(net, data)
        for handle in handles:
            handle.remove()
        return sum(float((z.mean((0, 2, 3)) - m.running_mean).abs().sum()) for m, z in seen)

    settings = {"channels": 0.5, "method": "select"}
    plain, repaired = (
        intrafuse.prune(model, x, **settings, repair=repair).model for repair in (None, "synthetic")
    )
    assert off(repaired) < 0.5 * off(plain)


def test_synthetic_repair_in_place():
    model, x = build("chain")
    settings = {"channels": 0.5, "method": "folding", "repair": "synthetic"}
    copied = intrafuse.prune(model, x, **settings).model
    assert intrafuse.prune(model, x, **settings, inplace=True).model is model
    assert same_state(model, copied.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair": "synthetic"}, "synthetic inputs need a batch norm with running statistics"),
        ({"method": Moment(**FEW)}, "synthetic inputs need a batch norm.*--data"),
        ({"method": Auto(**FEW)}, "synthetic inputs need a batch norm.*--data"),
        ({"repair": "batchnorm"}, "data"),
        ({"repair": "analytical"}, "repair must be one of analytic, batchnorm, synthetic"),
        ({"repair": True}, "repair must be one of analytic, batchnorm, synthetic"),
    ],
)
def test_refusals_leave_the_network_alone(settings, message):
    model, x = without_norms()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(IntrafuseError, match=message):
        intrafuse.prune(model, x, channels=0.5, inplace=True, **settings)
    assert same_state(model, state)


@pytest.mark.parametrize("repair", ["batchnorm", "synthetic", "analytical", True, 1])
def test_a_plan_takes_no_repair_but_the_analytic_one(repair):
    model, x = build("chain")
    with pytest.raises(IntrafuseError, match="repair"):
        intrafuse.plan(model, x, channels=0.5, repair=repair)


@pytest.mark.parametrize("kind", [Moment, Auto])
@pytest.mark.parametrize("value", [-1, float("nan"), "1", None, True])
@pytest.mark.parametrize("setting", ["ridge", "max_gain", "length", "images", "steps"])
def test_settings_that_are_no_such_numbers(kind, setting, value):
    with pytest.raises(IntrafuseError, match=setting):
        kind(**{setting: value})


@pytest.mark.parametrize("setting", ["images", "steps"])
@pytest.mark.parametrize("value", [0, 2.5])
def test_counts_are_whole_numbers(setting, value):
    with pytest.raises(IntrafuseError, match=setting):
        Moment(source="synthetic", **{setting: value})


def test_an_unknown_source():
    for kind in (Moment, Auto):
        with pytest.raises(IntrafuseError, match="source must be one of analytic, synthetic, cal"):
            kind(source="weights")


class Alien(Method):
    """A method that returns a map of another size."""

    name = "alien"

    def __call__(self, group, scores, width, context):
        return MergeMap.select(group.name, group.size + 1, torch.arange(width))


def test_a_wrong_map_is_named_before_it_is_repaired():
    model, x = build("mlp")
    with pytest.raises(IntrafuseError, match="must return the map of 12 to 6 channels"):
        intrafuse.plan(model, x, channels=0.5, method=Alien(), repair="analytic", include=["0"])


def test_inputs_that_the_model_refuses():
    """An example input without a batch counts as one of many channels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(IntrafuseError, match=r"refused synthetic inputs.*--data"):
        synthesise(model, torch.zeros(3, 6, 6), images=4, steps=1)


def test_a_seed_of_any_size():
    model, x = build("mlp")
    for seed in (-1, 2**70):
        made = intrafuse.plan(model, x, channels=0.5, method=Moment(**FEW), seed=seed)
        assert made.widths == {"0": 6, "3": 4}


# --- the command line


def figures(*arguments):
    result = CliRunner().invoke(app, ["prune", *map(str, arguments), "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("method", ["moment", "auto"])
def test_settings_reach_the_method(method):
    few = ("--source", "synthetic", "--images", 8, "--steps", 2)
    found = figures("resnet20", "--channels", 0.5, "--method", method, *few, "--include", "conv1")
    settings = {k: found["method"][k] for k in ("name", "source", "images", "steps")}
    assert settings == {"name": method, **FEW}
    assert {f.name for f in fields(MomentSource)} <= set(found["method"])


@pytest.mark.parametrize("repair", ["analytic", "synthetic"])
def test_repairs_on_the_command_line(repair, tmp_path, monkeypatch):
    made = synthesise.__wrapped__  # the function itself, whose defaults are read
    monkeypatch.setattr(made, "__kwdefaults__", {**made.__kwdefaults__, "steps": 2,
                                                       "images": 4})  # fmt: skip
    out = tmp_path / "small"
    figures("resnet20", "--channels", 0.5, "--method", "select", "--repair", repair, "--out", out)
    small = intrafuse.load(out)
    x = noise(2, 3, 32, 32)
    assert torch.isfinite(outputs(small, x)).all()


def test_predicted_widths_on_the_command_line():
    found = figures("mlp", "--params", 0.5, "--scope", "predicted", "--floor", 0.2)
    assert found["removed"]["params"] >= 0.5 and found["budget"]["scope"] == "predicted"
    assert all(w["after"] >= 0.2 * w["before"] for w in found["widths"].values())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--repair synthetic", 1, "synthetic inputs need a batch norm"),
        ("--repair batchnorm", 2, "--data"),
        ("--repair bn", 2, "repair must be one of analytic, batchnorm, synthetic"),
        ("--method moment --source synthetic", 1, "synthetic inputs need a batch norm"),
        ("--method auto --source calibration", 2, "calibration needs data"),
        ("--method auto --source magic", 2, "source must be one of analytic, synthetic, cal"),
        ("--method select --source synthetic", 2, "it belongs to moment, auto"),
        ("--method auto --transport none", 2, "auto has no setting transport"),
        ("--scope damage", 2, "scope must be one of uniform, global, predicted"),
    ],
)
def test_what_the_command_line_refuses(arguments, code, message):
    result = CliRunner().invoke(app, ["prune", "mlp", "--channels", "0.5", *arguments.split()])
    assert result.exit_code == code, result.output
    assert message in result.output and "Traceback" not in result.output
