"""A short run of every fuzzer of `benchmarks/fuzz.py`, and that they find what they look for."""

from __future__ import annotations

import json
import os
import sys
import time
from random import Random

import numpy as np
import pytest
import torch
from fuzz import DEFECTS, measured
from fuzz_kinds import KINDS

from intrafuse import IntrafuseError

torch.set_num_threads(1)
LOADS = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make what the kinds mutate, each once."""
    return {name: kind(tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_loaded_or_refused(made, name):
    found = {}
    for number in range(LOADS):
        content = made[name].mutant(Random(f"test {name} {number}"))
        outcome, told, _, _ = measured(made[name], content)
        assert outcome not in DEFECTS, f"{number}: {told}"
        found[outcome] = found.get(outcome, 0) + 1
    assert found["accepted"] and found["refused"] > LOADS / 4, "mutants must reach both ends"


@pytest.mark.parametrize("name", KINDS)
def test_a_mutant_is_made_again_from_its_number(made, name):
    first, second = (made[name].mutant(Random(f"0 {name} 7")) for _ in range(2))
    assert first == second and first != made[name].mutant(Random(f"0 {name} 8"))


def wait(_: bytes) -> bool:
    end = time.process_time() + 2.1
    while time.process_time() < end:
        pass
    return True


def crash(_: bytes) -> bool:
    raise TypeError("'int' object is not iterable")


def leave(_: bytes) -> bool:
    sys.exit(3)


@pytest.mark.parametrize(
    ("load", "outcome"),
    [
        (lambda _: True, "accepted"),
        (lambda _: (_ for _ in ()).throw(IntrafuseError("no")), "refused"),
        (wait, "hang"),
        (crash, "raw"),
        (leave, "raw"),
        (lambda _: np.ones(40_000_000).sum() > 0, "memory"),
    ],
)
def test_every_defect_is_told(load, outcome):
    class Kind:
        pass

    kind = Kind()
    kind.load = load
    assert measured(kind, b"")[0] == outcome


def test_a_network_that_was_changed_is_told(made, monkeypatch):
    """Take the digest for right, as it was before manifests had one."""
    kind = made["manifests"]
    data = json.loads(kind.saved.files[0]["intrafuse.json"])
    data["removed_layers"] = ["layers.2"]
    monkeypatch.setattr("intrafuse.checkpoint.manifest.signed", lambda data: data)
    outcome, told, _, _ = measured(kind, bytes((0, 0)) + json.dumps(data).encode())
    assert outcome == "changed" and "Identity" in told
    monkeypatch.undo()
    assert measured(kind, bytes((0, 0)) + json.dumps(data).encode())[0] == "refused"


def test_a_pipe_that_nobody_writes_to_is_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.WALL", 0.2)
    os.mkfifo(tmp_path / "pipe")

    class Kind:
        def load(self, _: bytes) -> bool:
            return bool((tmp_path / "pipe").read_text())

    assert measured(Kind(), b"")[0] == "hang"
