"""The demonstration, shortened: what it finds, saves and reloads."""

from __future__ import annotations

import json

import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from intrafuse import load
from intrafuse.catalog.data import load_data
from intrafuse.checkpoint.folder import MANIFEST
from intrafuse.cli import app
from intrafuse.study.demo import METHODS, run_demo
from intrafuse.study.evaluate import accuracy


def test_a_short_demo_finds_saves_and_reloads(tmp_path):
    torch.manual_seed(5)
    random = torch.get_rng_state()
    calls = []
    found = run_demo(
        tmp_path,
        seed=1,
        epochs=2,
        shares=[0.3, 0.6],
        points=2,
        progress=lambda *call: calls.append(call),
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert found.identical and found.comparison.accuracy > 90
    assert [row.method for row in found.comparison.rows] == [*METHODS] * 2
    names = ["original", *(f"{method}-{share}" for share in (0.3, 0.6) for method in METHODS)]
    assert [folder.name for folder in found.folders] == names
    test = load_data("digits")
    assert accuracy(load(found.folders[0]), test) == found.comparison.accuracy
    for folder, row in zip(found.folders[1:], found.comparison.rows, strict=True):
        model = load(folder)
        assert sum(p.numel() for p in model.parameters()) == row.params
        assert accuracy(model, test) == row.accuracy
        assert json.loads((folder / MANIFEST).read_text())["figures"] == {"accuracy": row.accuracy}
    assert [call for call in calls if call[1] == call[2]] == [
        ("training", 44, 44),
        ("pruning", 9, 9),
        ("divergence", 8, 8),
        ("landscape", 7, 7),
        ("sensitivity", 13, 13),
    ]
    assert found.report == tmp_path / "report.html"
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["rows"] == found.comparison.as_data()["rows"]
    assert told["command"] == "intrafuse demo --seed 1"


def test_the_command_prints_a_table_and_json_and_its_seed_repeats_it(tmp_path, monkeypatch):
    short = {"epochs": 1, "shares": (0.5,), "points": 2}
    monkeypatch.setattr(run_demo, "__kwdefaults__", {**run_demo.__kwdefaults__, **short})
    arguments = ["demo", "--out", str(tmp_path / "d"), "--json", str(tmp_path / "x.json")]
    result = CliRunner().invoke(app, [*arguments, "--seed", "2"])
    assert result.exit_code == 0, result.output
    assert all(method in result.stdout for method in METHODS)
    assert "agree bit for bit" in result.stderr
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["identical"] and len(data["saved"]) == 5 and len(data["rows"]) == 4
    assert data["kind"] == "comparison" and data["report"] in result.stderr
    again = run_demo(tmp_path / "again", seed=2)
    assert again.comparison.accuracy == data["original"]["accuracy"]
    for folder in again.folders:
        same = load(tmp_path / "d" / folder.name).state_dict()
        assert_close(load(folder).state_dict(), same, rtol=0, atol=0)
