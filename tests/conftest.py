"""Fixtures that several test files use."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from intrafuse import prune, save
from intrafuse.catalog.zoo import resolve_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # some tests run a sample of them


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of trained networks and data beside the project, or skip the test."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"../shared is absent: {folder} has no models and data")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a pruned network of the zoo."""
    net = resolve_model("mlp", hidden=(8, 6))
    small = prune(net.model, net.example_inputs, channels=0.5)
    return save(tmp_path / "small", small, architecture="mlp", arguments={"hidden": (8, 6)})


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[..., tuple[int, bytes, bytes]]:
    """Run a command in the test's folder, and interrupt it once it made a file named started."""

    def run(command: list[str], environment: dict[str, str]) -> tuple[int, bytes, bytes]:
        child = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # a suite that a shell runs in the background inherits an ignored interrupt
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 50
            while not (tmp_path / "started").exists():
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            child.send_signal(signal.SIGINT)
            output = child.communicate(timeout=20)
        finally:
            child.kill()
        return child.returncode, *output

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, so that no core waits for it at the end."""
    items.sort(key=lambda item: "test_factorize.py" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Free the garbage collector from modules and tests: they live to the end (a tenth of it)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


os.environ.setdefault("RAY_worker_niceness", "0")  # its workers are what the tests wait for
settings.register_profile("intrafuse", deadline=None, derandomize=True)
settings.load_profile("intrafuse")
torch.set_num_threads(1)  # two threads that wait for each other on a busy machine: 10 times slower
