"""The commands that look at prunings: divergence, landscape, sensitivity, ablation, cost."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.cli import app
from intrafuse.study.evaluate import accuracy
from intrafuse.study.evaluate.divergence import divergence


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save_file(resolve_model("mlp").model.state_dict(), path)
    return path


def record(*arguments):
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def network(weights):
    net = resolve_model("mlp")
    load_weights(net.model, weights)
    return net


def test_divergence(weights):
    common = ("mlp", "--weights", weights, "--limit", 50, "--methods", "select,moment")
    found = record("divergence", *common, "--channels", "0.3,0.5", "--layers")
    assert (found["kind"], found["images"], found["measure"]) == ("divergence", 50, "logits")
    assert [(r["method"], round(r["channels_removed"], 1)) for r in found["rows"]] == [
        *[("select", 0.3), ("moment", 0.3)],
        *[("select", 0.5), ("moment", 0.5)],
    ]
    import intrafuse

    net = network(weights)
    data = load_data("digits", limit=50)
    pruned = intrafuse.prune(net.model, net.example_inputs, channels=0.5, method="select")
    values = divergence(net.model, pruned.model, data)
    row = found["rows"][2]
    assert row["mean"] == pytest.approx(values.mean().item())
    assert row["quartiles"][1] == pytest.approx(values.quantile(0.5).item())
    assert sum(row["counts"]) == 50 and row["edges"][-1] >= values.max().item()
    assert found["rows"][3]["edges"] == row["edges"] != found["rows"][0]["edges"]
    assert [layer["layer"] for layer in row["layers"]] == ["layers.1", "layers.3"]
    for measure in ("softmax", "cosine"):
        one = record("divergence", *common, "--channels", "0.3", "--measure", measure)
        assert one["measure"] == measure and not one["rows"][0]["layers"]


def test_landscape_goes_on_where_it_stopped(weights, tmp_path):
    state = tmp_path / "plane.points"
    options = ("mlp", "--weights", weights, "--limit", 40, "--points", 3, "--state", state)
    found = record("landscape", *options, "--methods", "intra-fusion,select", "--channels", 0.4)
    assert [a["name"] for a in found["anchors"]] == ["original", "intra-fusion", "select"]
    net = network(weights)
    value = accuracy(net.model, load_data("digits", limit=40))
    assert found["anchors"][0]["value"] == pytest.approx(value)
    assert len(found["values"]) == 3 and found["channels_removed"] == 0.4
    kept = json.loads(state.read_text())
    kept["values"]["0 0"] = 77.0  # what is kept is not measured again
    state.write_text(json.dumps(kept))
    again = record("landscape", *options, "--methods", "intra-fusion,select", "--channels", 0.4)
    assert again["values"][0][0] == 77.0 and again["values"][1:] == found["values"][1:]


def test_sensitivity(weights):
    options = ("--limit", 40, "--channels", "0.5", "--methods", "select", "--include", "layers.3")
    found = record("sensitivity", "mlp", "--weights", weights, *options)
    assert [(row["group"], row["method"]) for row in found["rows"]] == [("layers.3", "select")]
    assert found["shares"] == [0.5] and len(found["weights_sha256"]) == 64


@pytest.mark.parametrize("setting", ["marginals", "metrics"])
def test_ablation(weights, setting):
    options = ("--setting", setting, "--limit", 40, "--channels", "0.5")
    found = record("ablation", "mlp", "--weights", weights, *options)
    assert found["setting"] == setting and 0 <= found["p_value"] <= 1
    names = {"marginals": "uTuS", "metrics": "random"}
    assert len(found["accuracies"][names[setting]]) == 2


def test_cost_of_a_network_and_its_pruning(weights, tmp_path):
    out = tmp_path / "small"
    result = run("prune", "mlp", "--weights", weights, "--channels", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    found = record("cost", "mlp", out, "--runs", 4, "--batch", 3)
    before, after = found["rows"]
    assert found["inputs"] == [[3, 1, 8, 8]]
    assert (before["params"], after["params"]) == (17226, 6570)
    assert after["peak"] < before["peak"] and before["latency"]["runs"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("divergence mlp --measure l1", 2, "must be one of logits, softmax, cosine"),
        ("divergence mlp --methods nothing --limit 5", 2, "nothing"),
        ("divergence vgg11_bn", 2, "--data"),
        ("landscape mlp --methods select", 2, "two different methods"),
        ("landscape mlp --methods select,select", 2, "two different methods"),
        ("landscape mlp --measure beauty --limit 5", 2, "accuracy, loss"),
        ("sensitivity mlp --include nothing --limit 5", 2, "nothing"),
        ("sensitivity mlp --channels half", 2, "--channels takes numbers"),
        ("ablation mlp --setting weather", 2, "marginals, targets"),
        ("cost nothing", 2, "nothing"),
        ("sensitivity mlp --exclude layers.* --limit 5", 1, "no channel group"),
        ("ablation mlp --exclude layers.* --limit 5", 1, "no channel group"),
        ("cost mlp --runs 3", 2, "--runs"),
        ("cost mlp --input-shape 3,32,32", 1, "cannot take its inputs"),
        ("cost mlp resnet20", 1, "got 'resnet20'"),
        ("cost mlp mlp", 2, "only once"),
    ],
)
def test_wrong_input(arguments, code, told):
    result = run(*arguments.split())
    assert result.exit_code == code, result.output
    assert told in result.stderr and "Traceback" not in result.stderr


def test_a_record_says_how_to_have_it_again(weights):
    typed = ["sensitivity", "mlp", "--limit", "40", "--weights", str(weights)]
    typed += ["--include", "layers.3", "--include", "layers.1", "--channels", "0.5"]
    command = record(*typed)["command"]
    assert command.startswith("intrafuse sensitivity mlp ")
    words = command.split()
    again = record(*[word for word in words[1:] if word not in ("--json", "-")])
    assert again["command"] == command
    assert [words[i + 1] for i, word in enumerate(words) if word == "--include"] == [
        "layers.3",
        "layers.1",
    ]
    assert (
        "--seed" not in words and "--layers" in record("divergence", "mlp", "--layers")["command"]
    )
