"""The command line: figures, exit codes, one-line errors, and what goes to which stream."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import learn_digits
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import file_sha256, load_weights, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, PLAN, WEIGHTS
from intrafuse.cli import app
from intrafuse.methods import METHODS, settings_of
from intrafuse.study.evaluate import accuracy

ROOT = Path(intrafuse.__file__).parents[1]
MAIN = [sys.executable, "-c", "from intrafuse.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

torch.set_num_threads(1)


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


def figures(*arguments: object) -> dict:
    """Run a command that must succeed, with nothing but JSON on standard output."""
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a multilayer perceptron that knows some digits."""
    torch.manual_seed(0)
    model = learn_digits(resolve_model("mlp").model)
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save_file(model.state_dict(), path)
    return path


# --- what commands find -------------------------------------------------------------------------


def test_inspect_lists_groups_and_what_is_locked():
    found = figures("inspect", "resnet20", "--num-classes", 7)
    assert found["params"] == 269_527 and found["macs"] == 40_550_848
    assert [group["index"] for group in found["groups"]] == list(range(10))
    first = found["groups"][0]
    assert first["name"] == "layer3.2.conv1" and first["channels"] == 64
    assert first["readers"] == [{"parameter": "layer3.2.conv2.weight", "axis": 1}]
    assert {"parameter": "layer3.2.conv1.weight", "axis": 0} in first["writers"]
    assert {"parameter": "layer3.2.bn1.weight", "axis": 0} in first["carriers"]
    (head,) = [group for group in found["locked"] if group["name"] == "linear"]
    assert head["reasons"] == ["model output"] and head["channels"] == 7
    table = run("inspect", "resnet20").stdout
    assert "layer3.2.conv1" in table and "model output" in table and "40,551,040" in table


def test_inspect_verifies_against_a_masked_copy():
    found = figures("inspect", "digits_resnet", "--verify")["verified"]
    assert found["relative"] < 1e-5 < found["effect"] and found["tolerance"] == 1e-4
    assert found["groups"] > 3 and 0.4 < found["channels_removed"] < 0.6
    assert "masked copy" in run("inspect", "mlp", "--verify").stdout
    assert "verified" not in figures("inspect", "mlp")


def test_a_network_that_cannot_be_pruned_is_inspected_all_the_same(tmp_path, monkeypatch):
    text = "import torch\n\n\ndef build():\n    return torch.nn.Linear(4, 2)\n"
    (tmp_path / "single_layer.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = run("inspect", "single_layer:build", "--input-shape", "4", "--verify")
    assert "nothing to verify" in found.stderr and "model output" in found.stdout


def test_inspect_frees_what_a_norm_holds_where_it_is_named(tmp_path, monkeypatch):
    layers = "nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)"
    text = f"from torch import nn\n\n\ndef build():\n    return nn.Sequential({layers})\n"
    (tmp_path / "with_norm.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    arguments = ("inspect", "with_norm:build", "--input-shape", "4", "--verify")
    assert "include=['0#normed']" in run(*arguments, "--json", "-").stdout
    found = figures(*arguments, "--include", "*#normed")
    assert [group["name"] for group in found["groups"]] == ["0#normed"]
    assert found["verified"]["relative"] < 1e-5 < found["verified"]["effect"]
    wrong = run(*arguments, "--include", "1#normed")
    assert wrong.exit_code == 2 and "include=['0#normed']" in wrong.stderr


def test_compare_gives_the_rows_of_the_design(weights):
    arguments = ["compare", "mlp", "--weights", weights, "--channels", "0.3,0.5,0.7"]
    found = figures(*arguments, "--methods", "select,intra-fusion", "--data", "digits")
    model = resolve_model("mlp").model
    load_weights(model, weights)
    original = found["original"]
    assert original["params"] == 17_226 and original["macs"] == 17_024
    assert original["accuracy"] == accuracy(model, load_data("digits")) > 80
    rows = found["rows"]
    assert [(r["method"], round(r["channels_removed"], 1)) for r in rows] == [
        (method, share) for share in (0.3, 0.5, 0.7) for method in ("select", "intra-fusion")
    ]
    for row in rows:
        assert list(row) == [
            *("method", "channels_removed", "params", "params_removed"),
            *("macs", "macs_removed", "accuracy", "seconds"),
        ]
        assert row["params_removed"] == pytest.approx(1 - row["params"] / original["params"])
        assert row["macs_removed"] == pytest.approx(1 - row["macs"] / original["macs"])
        assert 0 < row["channels_removed"] < 1 and 0 <= row["accuracy"] <= 100
        assert 0 < row["seconds"] < 60
    net = resolve_model("mlp")
    small = intrafuse.prune(model, net.example_inputs, channels=0.5, method="select")
    assert rows[2]["accuracy"] == accuracy(small.model, load_data("digits"))
    result = run(*arguments)
    assert "unpruned" in result.stdout and "intra-fusion" in result.stdout and not result.stderr


def test_prune_saves_what_evaluate_measures(weights, tmp_path):
    before, out = file_sha256(weights), tmp_path / "out"
    arguments = ["--params", 0.5, "--method", "select", "--importance", "l2", "--limit", 100]
    source = ["mlp", "--weights", weights, "--data", "digits"]
    found = figures("prune", *source, *arguments, "--out", out)
    assert file_sha256(weights) == before
    assert found["removed"]["params"] >= 0.5 and found["method"] == {"name": "select"}
    assert found["before"]["params"] == 17_226 and found["out"] == str(out)
    assert found["widths"]["layers.1"]["before"] == 128
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["source_sha256"] == before and manifest["importance"] == "l2"
    assert manifest["figures"] == found["figures"] and found["figures"]["images"] == 100
    with safe_open(out / WEIGHTS, "pt") as file:
        shape = file.get_slice("layers.1.weight").get_shape()
    assert shape == [found["widths"]["layers.1"]["after"], 64] and (out / PLAN).exists()
    measured = figures("evaluate", out, "--data", "digits", "--limit", 100)
    assert measured["accuracy"] == found["figures"]["accuracy"]
    assert measured["params"] == found["after"]["params"]
    assert measured["macs"] == found["after"]["macs"] and measured["images"] == 100
    assert figures("evaluate", out, "--model", "mlp")["images"] == 445


def test_every_option_reaches_the_plan(weights):
    found = figures(
        *("prune", "mlp", "--weights", weights, "--channels", 0.5, "--seed", 3),
        *("--scope", "global", "--floor", 0.2, "--round-to", 4, "--override", "layers.3=0.25"),
        *("--features", "all", "--target", "k-means", "--source-marginal", "importance"),
        *("--target-marginal", "softmax", "--p", 2, "--regularisation", 0.1),
        *("--normalisation", "barycentric", "--importance", "taylor", "--data", "digits"),
        *("--limit", 64, "--batch-size", 32, "--threads", 1),
    )
    assert found["method"] == {
        **{"name": "intra-fusion", "features": "all", "target": "k-means", "p": 2.0},
        **{"source_marginal": "importance", "target_marginal": "softmax"},
        **{"regularisation": 0.1, "normalisation": "barycentric"},
    }
    assert found["budget"]["scope"] == "global" and found["budget"]["floor"] == 0.2
    assert found["budget"]["overrides"] == {"layers.3": 0.25} and found["seed"] == 3
    assert found["widths"]["layers.3"]["after"] == 48
    assert found["widths"]["layers.1"]["after"] % 4 == 0 and torch.get_num_threads() == 1
    assert found["importance"] == "taylor" and found["figures"]["images"] == 64


def test_include_and_exclude_repeat():
    arguments = ["prune", "mlp", "--channels", 0.5]
    for choice in (["--include", "layers.1"], ["--exclude", "layers.3", "--exclude", "layers.5"]):
        widths = figures(*arguments, *choice)["widths"]
        assert [width["after"] for width in widths.values()] == [64, 64]


def test_repair_uses_the_training_images():
    arguments = ["prune", "digits_resnet", "--channels", 0.5, "--data", "digits", "--limit", 50]
    plain, repaired = (figures(*arguments, *more) for more in ([], ["--repair", "batchnorm"]))
    assert plain["after"] == repaired["after"]
    assert repaired["figures"]["accuracy_before"] == plain["figures"]["accuracy_before"]


def test_a_seed_decides_everything_random(tmp_path):
    arguments = ["prune", "mlp", "--channels", 0.5, "--importance", "random", "--out"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        figures(*arguments, tmp_path / name, "--seed", seed)
    digests = [file_sha256(tmp_path / name / WEIGHTS) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_is_an_option(method):
    given, kind = [], METHODS[method]
    for field in fields(kind):
        if field.default is not None:
            given += [f"--{field.name.replace('_', '-')}", field.default]
    data = [] if "source" not in settings_of(kind) else ["--data", "digits", "--limit", 20]
    found = figures("prune", *given, "mlp", "--channels", 0.5, "--method", method, *data)
    assert found["method"] == kind().as_data()
    for option in given[::2]:
        assert option in found["command"]


def test_a_mistyped_option_names_the_nearest():
    for option, near in (("--chanels", "--channels"), ("--max-gian", "--max-gain")):
        result = run("prune", "mlp", option, "0.5")
        assert result.exit_code == 2
        assert f"No such option: {option}. Did you mean {near}?" in result.stderr
    assert "requires an argument" in run("prune", "mlp", "--channels", ".5", "--p").stderr
    assert "extra argument" in run("prune", "mlp", "--channels", ".5", "--p", "2", "more").stderr


def test_a_recipe_makes_the_same_network_again(tmp_path, weights):
    asked = [
        "--weights",
        weights,
        "--params",
        0.1,
        "--method",
        "intra-fusion",
        "--p",
        2,
        "--importance",
        "l2",
    ]
    more = ["--override", "layers.1=0.2", "--exclude", "layers.3", "--seed", 3]
    figures("prune", "mlp", *asked, *more, "--out", tmp_path / "a")
    recipe = tmp_path / "a" / "recipe.yaml"
    for _ in range(2):  # the second takes the place of the first
        again = figures(
            "prune", "mlp", "--weights", weights, "--recipe", recipe, "--out", tmp_path / "b"
        )
    assert again["method"]["p"] == 2.0 and again["budget"]["overrides"] == {"layers.1": 0.2}
    same = [(tmp_path / name / "recipe.yaml").read_bytes() for name in "ab"]
    assert same[0] == same[1]
    digests = [file_sha256(tmp_path / name / WEIGHTS) for name in "ab"]
    assert digests[0] == digests[1]


def test_options_replace_those_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("channels: 0.25  # a quarter\nmethod: {name: folding, features: writers}\n")
    assert figures("prune", "mlp", "--recipe", recipe)["method"]["features"] == "writers"
    found = figures("prune", "mlp", "--recipe", recipe, "--macs", 0.5, "--method", "select")
    assert found["method"] == {"name": "select"} and found["budget"]["kind"] == "macs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chanels: 0.5", "there is no such setting; got 'chanels'. Remedy: did you mean channels?"),
        ("channels: 2", r"channels must be a share in [0, 1); got 2"),
        ("{channels: 0.5, method: {name: folding, p: 2}}", "folding has no setting p"),
        ("{channels: 0.5, method: nothing}", "method must be one of select"),
        ("[1, 2]", "a recipe is a mapping of settings"),
        ("a: [", "the recipe cannot be read"),
        ("method: select", "exactly one budget"),
    ],
)
def test_a_recipe_that_is_wrong(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    result = run("prune", "mlp", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code in (1, 2) and message in result.stderr
    assert len(result.stderr.splitlines()) <= 2


FACTORY = """
import pathlib, time, torch
def build(num_classes=10):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.ReLU(),
                               torch.nn.Linear(20, num_classes))
build.example_inputs = (1, 8, 8)
def slow():
    pathlib.Path("started").touch()
    time.sleep(60)
"""


def test_a_factory_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    found = figures("prune", "mynet:build", "--channels", 0.5, "--out", "out", "--data", "digits")
    group = {"index": 0, "before": 20, "after": 10, "written_by": ["1"], "read_by": ["3"]}
    assert found["widths"] == {"1": group}
    again = figures("evaluate", "out", "--model", "mynet:build", "--data", "digits")
    assert again["accuracy"] == found["figures"]["accuracy"] and again["params"] == 760
    refused = run("evaluate", "out", "--data", "digits")
    assert refused.exit_code == 1 and "pass it as model=" in refused.stderr
    sys.modules.pop("mynet")


# --- streams, files, exit codes -----------------------------------------------------------------


def test_json_goes_to_a_file_and_the_table_to_the_terminal(tmp_path):
    path = tmp_path / "new" / "found.json"
    result = run("compare", "mlp", "--channels", "0.5", "--methods", "select", "--json", path)
    assert result.exit_code == 0 and "unpruned" in result.stdout
    assert json.loads(path.read_text())["rows"][0]["params"] == 6_570


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("prune mlp", 2, "exactly one budget of channels, params, macs"),
        ("prune mlp --channels 0.5 --macs 0.2", 2, "exactly one budget"),
        ("prune mlp --channels 1.5", 2, r"channels must be a share in \[0, 1\); got 1.5"),
        ("prune mlp --channels nan", 2, "channels must be a share"),
        ("prune mpl --channels .5", 2, "unknown model; got 'mpl'. Remedy: try mlp"),
        ("prune mlp --channels .5 --method select --p 2", 2, "it belongs to intra-fusion"),
        ("prune mlp --channels .5 --target x", 2, "target must be one of important, k-means"),
        ("prune mlp --channels .5 --method x", 2, "method must be one of select, intra-fusion"),
        ("prune mlp --channels .5 --importance x", 2, "unknown importance"),
        ("prune mlp --channels .5 --importance taylor", 2, "--data SPEC"),
        ("prune mlp --channels .5 --repair batchnorm", 2, "--data"),
        ("prune mlp --channels .5 --repair x", 2, "repair must be one of analytic, batchnorm"),
        ("prune mlp --channels .5 --scope x", 2, "scope must be one of uniform, global"),
        ("prune mlp --channels .5 --round-to 0", 2, "round_to must be a whole number from 1"),
        ("prune mlp --channels .5 --exclude layer.1", 2, "near matches: layers.1"),
        ("prune mlp --channels .5 --override layers.1", 2, "--override takes PATTERN=SHARE"),
        ("prune mlp --channels .5 --override layers.1=x", 2, "--override takes numbers"),
        ("prune mlp --channels .5 --data nothing", 2, "unknown data set"),
        ("prune mlp --channels .5 --data cifar10:/absent", 1, "folder does not exist"),
        ("prune mlp --channels .5 --weights /absent", 1, "weights cannot be read"),
        ("prune mlp --channels .5 --out FULL", 1, "holds other files .thesis.txt"),
        ("prune mlp --channels .5 --out FULL/thesis.txt", 1, "is a file"),
        ("prune mlp --params .999 --scope global --floor .5", 1, "at most 0.61"),
        ("inspect mlp --device nowhere", 2, "unknown device"),
        ("inspect mlp --device cuda:99", 1, "the device cannot be used"),
        ("inspect mlp --input-shape 1,x", 2, "--input-shape takes whole numbers"),
        ("inspect mlp --input-shape 3,9,9", 1, "cannot be traced"),
        ("inspect mlp --json FULL", 2, "--json takes a file"),
        ("inspect mlp --json FULL/thesis.txt/x", 1, "cannot be written"),
        ("inspect absent.module:build", 1, "cannot be imported"),
        ("compare resnet20", 2, r"got \(3, 32, 32\). Remedy: give --data SPEC"),
        ("compare mlp --channels .5,x", 2, "--channels takes numbers"),
        ("compare mlp --methods select,x", 2, "method must be one of"),
        ("compare mlp --num-classes 7", 1, "must return 10 logits"),
        ("evaluate /absent", 1, "is a folder, and nothing is unpickled"),
        ("evaluate FULL", 1, "manifest cannot be read"),
        ("evaluate FULL --num-classes 3", 2, "--num-classes belongs to --model"),
    ],
)
def test_a_failure_is_one_line_and_changes_nothing(tmp_path, arguments, code, message):
    (tmp_path / "thesis.txt").write_text("mine")
    result = run(*arguments.replace("FULL", str(tmp_path)).split())
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("intrafuse: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not result.stdout
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "arguments", ["", "nothing", "prune", "prune mlp --p x", "inspect mlp --threads 0", "demo x"]
)
def test_bad_usage_exits_with_2(arguments):
    result = run(*arguments.split())
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["inspect", "prune", "compare", "evaluate", "fuse", "demo"])
def test_every_command_has_the_common_options(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in ("--json", "--seed", "--device", "--threads"):
        assert option in result.stdout


# --- real processes -----------------------------------------------------------------------------


def test_public_names_are_no_modules():
    import intrafuse.pruning.plan
    import intrafuse.pruning.prune  # binds the module to the package, where the function must stay

    found = {name: getattr(intrafuse, name) for name in intrafuse.__all__}
    assert found.keys() <= set(dir(intrafuse))
    assert not any(isinstance(value, ModuleType) for value in found.values())
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = intrafuse.prun


def test_help_and_version_do_without_pytorch():
    code = (
        "import sys; from intrafuse.cli import app; from typer.testing import CliRunner;"
        "runs = [CliRunner().invoke(app, [flag]) for flag in ('--help', '--version')];"
        "assert not any(run.exit_code for run in runs);"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules;"
        "print(runs[1].stdout)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["intrafuse", intrafuse.__version__]


def test_a_process_shows_progress_on_a_terminal(weights):
    command = [
        *MAIN,
        *f"compare mlp --weights {weights} --channels 0.5 --threads 1 --json -".split(),
    ]
    ours, theirs = pty.openpty()
    try:
        child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown, output = b"", child.stdout.read()
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's answer when the other end is closed
                break
            if not part:
                break
            shown += part
        assert child.wait() == 0
    finally:
        os.close(ours)
    assert len(json.loads(output)["rows"]) == 2
    assert b"comparing" in shown and b"100%" in shown and b"\x1b[" in shown


def test_an_interrupt_is_quiet(tmp_path, interrupted):
    (tmp_path / "mynet.py").write_text(FACTORY)
    assert interrupted([*MAIN, "inspect", "mynet:slow"], ENVIRONMENT) == (130, b"", b"")
