"""`intrafuse fuse`: what it finds, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import learn_digits
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.cli import app
from intrafuse.cli.fuse import NetworkOptions
from intrafuse.study.evaluate import accuracy


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train two multilayer perceptrons from different starts."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = learn_digits(resolve_model("mlp").model)
        found.append(tmp_path_factory.mktemp("weights") / f"{seed}.safetensors")
        save_file(model.state_dict(), found[-1])
    return found


def given(files: list[Path]) -> list[object]:
    return ["fuse", "mlp", "--weights", files[0], "--weights", files[1]]


@pytest.mark.parametrize("method", ["ot", "assignment", "moment"])
def test_fuse_saves_what_evaluate_measures(files, method, tmp_path):
    out = tmp_path / "out"
    how = ["--method", method, "--features", "activations", "--repair", "batchnorm"]
    result = run(*given(files), *how, "--data", "digits", "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["weights"] == [0.5, 0.5] and found["out"] == str(out)
    models = [resolve_model("mlp") for _ in files]
    for path, resolved in zip(files, models, strict=True):
        load_weights(resolved.model, path)
    expected = [accuracy(resolved.model, load_data("digits")) for resolved in models]
    assert found["figures"]["accuracy_of_networks"] == expected
    plain = models[0].model
    for one, other in zip(plain.parameters(), models[1].model.parameters(), strict=True):
        one.data = (one.data + other.data) / 2
    assert found["figures"]["accuracy"] > accuracy(plain, load_data("digits")) + 10
    measured = json.loads(run("evaluate", out, "--data", "digits", "--json", "-").stdout)
    assert measured["accuracy"] == found["figures"]["accuracy"]
    assert measured["params"] == found["params"]


def test_a_folder_counts_as_weights_and_width_shrinks_the_result(files, tmp_path):
    narrow, out = tmp_path / "narrow", tmp_path / "out"
    source = ["mlp", "--weights", files[0], "--channels", 0.5]
    assert run("prune", *source, "--out", narrow).exit_code == 0
    arguments = ["fuse", "mlp", "--weights", files[0], "--weights", narrow]
    result = run(*arguments, "--shares", "3,1", "--width", 0.25, "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["weights"] == [0.75, 0.25]
    assert all(w[1] == w[0] // 2 and w[2] == w[0] * 3 // 4 for w in found["widths"].values())
    width = found["widths"]["layers.1"][2]
    assert intrafuse.load(out).layers[1].out_features == width


def test_without_data_the_table_shows_sizes(files):
    result = run(*given(files))
    assert result.exit_code == 0 and "fused" in result.stdout and "accuracy" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--features", "activations"], 2, "needs unlabeled data"),
        (["--repair", "batchnorm"], 2, "needs unlabeled data"),
        (["--method", "mean"], 2, "method must be one of ot, assignment, moment"),
        (["--shares", "1,-1"], 2, "not negative"),
        (["--shares", "1,1,1"], 2, "weights must be 2 numbers"),
        (["--reference", 2], 2, "reference must be the index"),
    ],
)
def test_bad_input_is_one_line(files, arguments, code, message):
    result = run(*given(files), *arguments)
    assert result.exit_code == code and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_one_network_and_another_architecture_are_refused(files):
    result = run(*given(files)[:4])
    assert result.exit_code == 2 and "at least two networks" in result.stderr
    result = run("fuse", "digits_resnet", "--weights", files[0], "--weights", files[1])
    assert result.exit_code == 1 and "missing" in result.stderr


@pytest.mark.parametrize("method", ["ot", "moment"])
def test_a_saved_pruned_network_may_be_the_reference(files, method, tmp_path):
    small, out = tmp_path / "small", tmp_path / "out"
    pruned = run("prune", "mlp", "--weights", files[0], "--channels", 0.5, "--out", small)
    assert pruned.exit_code == 0, pruned.output
    both = ["fuse", "mlp", "--weights", small, "--weights", files[1]]
    result = run(*both, "--method", method, "--out", out)
    assert result.exit_code == 0, result.output
    assert intrafuse.load(out).layers[1].out_features == 64


def test_a_model_that_is_one_module_serves_for_every_file(tmp_path, monkeypatch):
    code = (
        "from torch import nn\nbuilt = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))"
    )
    (tmp_path / "users_fused.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, file in enumerate(files):
        torch.manual_seed(i)
        save_file(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), file)
    name = "users_fused:built"
    options = NetworkOptions(model=name, weights=files, input_shape="4")
    first, second = (resolved.model[0].weight for resolved in options.resolve("cpu"))
    assert not torch.equal(first, second)
