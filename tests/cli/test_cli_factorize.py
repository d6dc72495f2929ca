"""`intrafuse factorize`: options become a recipe, a run is shown, bad input is refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import intrafuse
from intrafuse.cli import app
from intrafuse.cli.factorize import RecipeOptions
from intrafuse.study.training import PRESETS


def run(*arguments: object):
    return CliRunner().invoke(app, ["factorize", *map(str, arguments)])


def test_options_become_a_recipe():
    made = RecipeOptions(
        scheme="paf",
        model="mlp",
        data="digits",
        split="k-fold",
        folds=4,
        epochs=3,
        finetune_epochs="2,1",
        channels=0.7,
        steps=4,
        method="select",
        fusion="moment",
        features="weights",
    ).build(seed=5)
    assert (made.splits.scheme, made.splits.folds, made.seed) == ("k-fold", 4, 5)
    assert (made.training.epochs, made.pruned.epochs, made.fused.epochs) == (3, 2, 1)
    assert made.training == PRESETS["short"].model_copy(update={"epochs": 3})
    assert (made.pruning.channels, made.pruning.steps, made.pruning.method) == (0.7, 4, "select")
    assert (made.fusing.method, made.fusing.features) == ("moment", "weights")


def test_a_preset_serves_all_trainings():
    made = RecipeOptions(scheme="whole", model="mlp", preset="paper", finetune_epochs="10").build(0)
    assert made.training == PRESETS["paper"]
    assert made.pruned == made.fused == PRESETS["paper-finetune"].model_copy(update={"epochs": 10})


def test_options_change_a_recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: paf\nmodel: mlp\nseed: 3\ntraining: paper\nsplits: {folds: 6}\n")
    made = RecipeOptions(scheme="fap", recipe=file, split="k-fold", epochs=7).build(None)
    assert (made.scheme, made.model, made.seed) == ("fap", "mlp", 3)
    assert made.training == PRESETS["paper"].model_copy(update={"epochs": 7})
    assert (made.splits.scheme, made.splits.folds) == ("k-fold", 6)


def test_options_change_defaults_of_what_a_recipe_file_leaves_out(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: paf\nmodel: mlp\n")
    made = RecipeOptions(scheme="paf", recipe=file, epochs=7).build(None)
    assert made.training == PRESETS["short"].model_copy(update={"epochs": 7})


@pytest.mark.parametrize(("given", "seed"), [((), 3), (("--seed", 0), 0)])
def test_a_seed_of_0_changes_that_of_a_recipe_file(given, seed, tmp_path):
    file = tmp_path / "recipe.yaml"
    never = "{epochs: 0}"
    text = f"seed: 3\ntraining: {never}\npruned: {never}\nfused: {never}\n"
    file.write_text(f"scheme: whole\nmodel: mlp\n{text}")
    result = run("whole", "--recipe", file, "--out", tmp_path / "run", "--json", "-", *given)
    assert json.loads(result.stdout)["recipe"]["seed"] == seed


def test_a_run_is_shown_and_evaluate_reads_it(tmp_path):
    out = tmp_path / "run"
    how = ["--epochs", 1, "--finetune-epochs", 0, "--augment", "none", "--json", "-"]
    result = run("whole", "mlp", "--out", out, *how)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [stage["name"] for stage in told["records"]] == ["trained", "pruned-1", "tuned"]
    assert told["recipe"]["training"]["epochs"] == 1
    measured = CliRunner().invoke(app, ["evaluate", str(out / "network"), "--json", "-"])
    assert json.loads(measured.stdout)["accuracy"] == told["accuracy"]
    assert intrafuse.load(out / "network").layers[1].out_features == 64


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["paf"], "MODEL"),
        (["pap", "mlp"], "scheme"),
        (["paf", "mlp", "--channels", 1], "pruning.channels"),
        (["paf", "mlp", "--split", "k-fold", "--folds", 3], "even number"),
        (["paf", "mlp", "--preset", "long"], "short or paper"),
        (["paf", "mlp", "--finetune-epochs", "1,2,3"], "one or two"),
        (["paf", "mlp", "--private"], "epochs of fused to 0"),
        (["paf", "mlp", "--workers", "slurm"], "workers"),
        (["paf", "mlp", "--data", "nothing"], "unknown data set"),
        (["whole", "no_such"], "no_such"),
        (["fap", "mlp", "--method", "best"], "best"),
        (["fap", "mlp", "--importance", "l3"], "unknown importance"),
        (["fap", "mlp", "--overlap", 0.2], "belongs to the scheme overlapping"),
        (["fap", "mlp", "--split", "files", "--file", "a", "--file", "b"], "positions"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, rule, tmp_path):
    result = run(*arguments, "--out", tmp_path / "run")
    assert result.exit_code in (1, 2) and rule in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_absent_is_refused(tmp_path):
    result = run("paf", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 1 and "cannot be read" in result.stderr
