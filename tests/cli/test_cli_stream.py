"""`intrafuse prune --stream`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from language_models import build

import intrafuse
from intrafuse.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("gpt2").save_pretrained(tmp_path / "source", max_shard_size="50KB")
    return tmp_path / "source"


def test_a_checkpoint_is_pruned_and_loads_again(tmp_path, source):
    out, record = tmp_path / "out", tmp_path / "record.json"
    command = ["prune", f"hf:{source}", "--stream", "--shard-size", "30KB", "--channels", 0.5]
    result = run(*command, "--method", "select", "--out", out, "--json", record)
    assert result.exit_code == 0, result.output
    assert "Pruned by select" in result.stdout and f"saved in {out}" in result.stderr
    told = json.loads(record.read_text())
    assert told["kind"] == "pruning" and "--stream" in told["command"]
    small = intrafuse.load(out, build("gpt2"))
    assert told["after"]["params"] == sum(p.numel() for p in small.parameters())
    again = run(*command, "--out", out)
    assert again.exit_code == 1 and "holds a network" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlp", "--stream", "--out", "x"], "does not take a model other than hf:FOLDER"),
        (["hf:x", "--stream"], "needs --out DIR"),
        (["hf:x", "--stream", "--out", "x", "--data", "digits"], "does not take --data"),
        (["hf:x", "--shard-size", "1GB", "--out", "x"], "--shard-size needs --stream"),
        (["hf:x", "--stream", "--out", "x", "--importance", "taylor"], "importance 'taylor'"),
        (["hf:x", "--stream", "--out", "x", "--shard-size", "big"], "size of a shard"),
    ],
)
def test_what_streaming_cannot_do_is_bad_usage(arguments, message):
    result = run("prune", *arguments, "--channels", 0.5)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
