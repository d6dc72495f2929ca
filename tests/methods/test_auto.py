"""Auto: the smallest predicted error wins up to the margin; notes go wherever plans go."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from networks import NETWORKS, build, covering, outputs
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import intrafuse
from intrafuse import Plan
from intrafuse.cli import app
from intrafuse.methods import METHODS, Auto, Method, Select
from intrafuse.methods.auto import MARGIN, USUAL

PLAIN = {"select", "intra-fusion", "folding"}
CANDIDATES = PLAIN | {f"moment, {name}" for name in (*PLAIN, "greedy", "fused")}


class Unknown(nn.Module):
    """No rule of moments describes what the last layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tan(self.a(x)))


def duplicated():
    """Every hidden channel stands in the network twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)),
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
        for i in (0, 1, 3, 4):
            for tensor in model[i].state_dict().values():
                if tensor.dim():
                    tensor[len(tensor) // 2 :] = tensor[: len(tensor) // 2]
    return model, torch.zeros(1, 3, 4, 4)


def note_of(chosen="select", **predicted):
    return {"chosen": chosen, "predicted": predicted}


@dataclass(frozen=True)
class Saying(Method):
    """Select, and say something of it."""

    note: dict
    name: ClassVar[str] = "saying"
    folds_batchnorm: ClassVar[bool] = False

    def __call__(self, group, scores, width, context):
        return replace(Select()(group, scores, width, context), note=self.note)


# --- what is chosen


@pytest.mark.parametrize(("name", "source"), covering(NETWORKS, ["analytic", "calibration"]))
def test_every_small_network_at_every_width(name, source):
    model, x = build(name)
    for share in (0.1, 0.6) if source == "analytic" else (0.6,):
        pruned = intrafuse.prune(model, x, channels=share, method=Auto(source=source), data=[x])
        made = pruned.plan
        assert set(made.notes) == {step.group for step in made.maps}
        for note in made.notes.values():
            check_choice(note)
        assert outputs(pruned.model, x).shape == outputs(model, x).shape
        for parameter, tensor in pruned.model.state_dict().items():
            parameter = made.graph.aliases.get(parameter, parameter)
            assert tuple(tensor.shape) == made.shapes()[parameter]
            assert torch.isfinite(tensor).all() or not tensor.is_floating_point()
        assert all(group in str(made) and group in str(pruned.report) for group in made.notes)


def check_choice(note):
    predicted = note["predicted"]
    if not predicted:
        assert note["chosen"] == "folding"
        return
    assert set(predicted) == CANDIDATES
    assert all(-1e-6 <= error <= 2 + 1e-6 for error in predicted.values())
    best, usual, rounding = min(predicted.values()), predicted[USUAL], 1e-6
    if note["chosen"] == USUAL:
        assert best >= (1 - MARGIN) * usual - rounding
    else:
        assert predicted[note["chosen"]] == best <= (1 - MARGIN) * usual + rounding


def test_duplicates_merge_without_loss():
    model, x = duplicated()
    made = intrafuse.plan(model, x, channels=0.5, method="auto")
    for note in made.notes.values():
        assert note["predicted"][note["chosen"]] < 2e-3
    method = Auto(ridge=0)
    inputs = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    small = intrafuse.prune(model, x, channels=0.5, method=method).model
    want = outputs(model, inputs)
    torch.testing.assert_close(outputs(small, inputs), want, rtol=1e-3, atol=1e-3)


def test_without_moments_channels_are_folded():
    torch.manual_seed(0)
    model, x = Unknown(), torch.zeros(1, 4)
    pruned = intrafuse.prune(model, x, channels=0.5, method="auto")
    assert pruned.plan.notes == {"a": {"chosen": "folding", "predicted": {}}}
    folded = intrafuse.prune(model, x, channels=0.5, method="folding")
    for name, tensor in folded.model.state_dict().items():
        torch.testing.assert_close(pruned.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert "folding" in str(pruned.plan) and "folding" in str(pruned.report)


def test_the_same_seed_chooses_the_same():
    model, x = build("residual")
    first, second = (
        intrafuse.plan(model, x, channels=0.5, method="auto", seed=3) for _ in range(2)
    )
    assert first.notes == second.notes
    for a, b in zip(first.maps, second.maps, strict=True):
        assert torch.equal(a.encode, b.encode) and torch.equal(a.decode, b.decode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, x = build("residual")
    pruned = intrafuse.prune(model.to(dtype), x.to(dtype), channels=0.5, method="auto")
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}
    for note in pruned.plan.notes.values():
        check_choice(note)


def test_dead_channels():
    model, x = build("chain")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    pruned = intrafuse.prune(model, x, channels=0.5, method="auto")
    torch.testing.assert_close(outputs(pruned.model, x), outputs(model, x), rtol=1e-3, atol=1e-3)
    for note in pruned.plan.notes.values():
        check_choice(note)


# --- notes


@pytest.mark.parametrize("name", ["residual", "groupnorm"])
def test_notes_survive_a_file(name, tmp_path):
    model, x = build(name)
    made = intrafuse.plan(model, x, channels=0.5, method="auto")
    made.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.notes == made.notes and made.notes
    assert str(loaded) == str(made)
    torch.testing.assert_close(outputs(loaded.apply(model), x), outputs(made.apply(model), x))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"auto"}))
def test_other_methods_say_nothing(method, tmp_path):
    model, x = build("chain")
    pruned = intrafuse.prune(model, x, channels=0.5, method=method)
    assert pruned.plan.notes == {} == pruned.report.notes
    assert "chosen" not in str(pruned.plan) and "Choices" not in str(pruned.report)
    pruned.plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").notes == {}


def test_the_report_tells_the_best_that_was_not_chosen():
    model, x = build("mlp")
    method = Saying(note_of(select=0.5, folding=0.25, other=1))
    report = intrafuse.prune(model, x, channels=0.5, method=method).report
    (line, _) = [line for line in str(report).splitlines() if "folding" in line]
    assert "select" in line and "0.5000" in line and "folding (0.2500)" in line


@pytest.mark.parametrize("note", [{"chosen": "x"}, {"remark": [1, 2]}, note_of(select=1.0)])
def test_notes_of_other_forms_print_and_save(note, tmp_path):
    model, x = build("mlp")
    pruned = intrafuse.prune(model, x, channels=0.5, method=Saying(note))
    assert "3" in str(pruned.plan) and "Choices" in str(pruned.report)
    pruned.plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").notes == {"0": note, "3": note}


def rewrite(path, change):
    """Change the JSON of a saved plan."""
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["plan"])
    change(data)
    save_file(load_file(path), path, {"plan": json.dumps(data)})


def test_a_plan_without_notes_loads(tmp_path):
    """Plans that were saved before methods could say anything."""
    model, x = build("mlp")
    intrafuse.plan(model, x, channels=0.5, method="auto").save(tmp_path / "plan")
    rewrite(tmp_path / "plan", lambda data: data.pop("notes"))
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.notes == {} and "chosen" not in str(loaded)


@pytest.mark.parametrize("notes", [5, [], ["a", "b"], [None, None], [[], []], [{}]])
def test_damaged_notes_are_refused(notes, tmp_path):
    model, x = build("mlp")
    intrafuse.plan(model, x, channels=0.5, method="auto").save(tmp_path / "plan")
    rewrite(tmp_path / "plan", lambda data: data.update(notes=notes))
    with pytest.raises(intrafuse.IntrafuseError, match="readable safetensors file that intrafuse"):
        Plan.load(tmp_path / "plan")


def test_the_command_line_tells_notes():
    arguments = ["prune", "mlp", "--channels", "0.5", "--json", "-", "--method"]
    result = CliRunner().invoke(app, [*arguments, "auto"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data["notes"]) == set(data["widths"]) and data["notes"]
    for note in data["notes"].values():
        check_choice(note)
    assert data["method"]["name"] == "auto"
    result = CliRunner().invoke(app, [*arguments, "select"])
    assert json.loads(result.stdout)["notes"] == {}
