"""Factorized training: recipes, what a run leaves, faults of workers, driver, disk and files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from networks import same_state
from torch import nn

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.study.evaluate import accuracy
from intrafuse.study.factorize import read_recipe
from intrafuse.study.factorize.recipe import make_recipe
from intrafuse.study.factorize.result import read_result
from intrafuse.study.factorize.stages import Line
from intrafuse.study.report.kinds.factorized import timeline
from intrafuse.support.errors import IntrafuseError

TRAINING = {"epochs": 4, "batch": 32, "rate": 0.1, "schedule": "one-cycle"}
SETTINGS = {
    "model": "digits_resnet",
    "arguments": {"width": 0.5},
    "training": TRAINING,
    "pruned": {**TRAINING, "epochs": 1, "rate": 0.02},
    "fused": {**TRAINING, "epochs": 1, "rate": 0.02},
}


def recipe(scheme: str, **changes) -> intrafuse.Recipe:
    return make_recipe({"scheme": scheme, **SETTINGS, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, intrafuse.Factorized]:
    root = tmp_path_factory.mktemp("runs")
    return {s: intrafuse.factorize(recipe(s), root / s) for s in ("whole", "paf", "fap")}


def final(folder: Path) -> dict[str, torch.Tensor]:
    return intrafuse.load(folder / "network").state_dict()


def assert_equal(model: nn.Module, folder: Path) -> None:
    assert same_state(model, final(folder))


# --- recipes ------------------------------------------------------------------------------------


def test_a_recipe_survives_its_file(tmp_path):
    made = recipe("paf", splits={"scheme": "k-fold", "folds": 4}, seed=7)
    text = yaml.safe_dump(made.model_dump(mode="json"))
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml") == made
    (tmp_path / "r.json").write_text(made.model_dump_json())
    changed = read_recipe(tmp_path / "r.json", {"training": {"epochs": 9}, "seed": 1})
    assert changed.training.epochs == 9 and changed.training.batch == 32 and changed.seed == 1


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"model": "mlp"}, "scheme"),
        ({"scheme": "pap", "model": "mlp"}, "scheme"),
        ({"scheme": "paf", "model": "mlp", "epoch": 3}, "epoch"),
        ({"scheme": "paf", "model": "mlp", "training": "long"}, "no preset 'long'"),
        ({"scheme": "paf", "model": "mlp", "pruning": {"channels": 1.0}}, "pruning.channels"),
        ({"scheme": "paf", "model": "mlp", "private": True}, "epochs of fused to 0"),
        ({"scheme": "fap", "model": "mlp", "private": True}, "fused and pruned to 0"),
        ({"scheme": "whole", "model": "mlp", "private": True}, "one place"),
        (
            {"scheme": "paf", "model": "mlp", "private": True, "fused": {"epochs": 0},
             "fusing": {"repair": "batchnorm"}},
            "cannot read private data",
        ),
        ({"scheme": "paf", "model": "mlp", "arguments": {"input_shape": [1, 8, 8]}}, "arguments"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused_by_the_field(settings, rule):
    with pytest.raises(IntrafuseError, match=rule) as caught:
        make_recipe(settings)
    assert caught.value.usage


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(IntrafuseError, match="recipe"):
        read_recipe(tmp_path / "r.yaml")


# --- what a run leaves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "stages"),
    [
        ("whole", ["0 trained", "0 pruned-1", "0 tuned"]),
        ("paf", ["1 trained", "1 pruned-1", "2 trained", "2 pruned-1", "0 fused"]),
        ("fap", ["1 trained", "2 trained", "0 fused", "0 pruned-1"]),
    ],
)
def test_the_stages_of_a_scheme(undisturbed, scheme, stages):
    run = undisturbed[scheme]
    assert [f"{r.part} {r.name}" for r in run.result.records] == stages
    assert run.model.conv1.out_channels == 4
    assert_equal(run.model, run.folder)
    measured = accuracy(run.model, load_data("digits"))
    assert measured == run.result.accuracy and measured > 50
    images = [r.images for r in run.result.records]
    assert images == [676 if r.part else 1352 for r in run.result.records]
    assert all(r.end > r.start for r in run.result.records)


def test_the_record_of_a_run(undisturbed):
    run = undisturbed["paf"]
    assert read_result(run.folder) == run.result
    told = json.loads((run.folder / "result.json").read_text())
    assert told["recipe"] == recipe("paf").model_dump(mode="json")
    assert told["accuracy"] == run.result.accuracy
    parts = run.result.parts
    assert told["seconds"] == pytest.approx(max(parts.values()) + run.result.records[-1].seconds)
    folders = [run.folder / "parts" / str(part) for part in (1, 2)]
    received = [p.stat().st_size for f in folders for p in (f / "pruned-1").iterdir()]
    assert run.result.received == sum(received)
    assert undisturbed["whole"].result.received == undisturbed["whole"].result.sent == 0
    assert (run.folder / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_several_runs(undisturbed, tmp_path):
    records = {name: run.result.record({}) for name, run in undisturbed.items()}
    text = timeline(records).write(tmp_path / "t.svg").read_text()
    assert "<svg" in text


def test_a_finished_run_is_not_run_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed["fap"].folder, tmp_path / "run")
    again = intrafuse.factorize(recipe("fap"), tmp_path / "run")
    assert again.result.records == undisturbed["fap"].result.records
    assert_equal(undisturbed["fap"].model, tmp_path / "run")


def test_iterative_pruning_reaches_the_share(tmp_path):
    run = intrafuse.factorize(
        recipe("whole", pruning={"channels": 0.75, "steps": 2}, training={"epochs": 0}), tmp_path
    )
    assert [r.name for r in run.result.records][1:3] == ["pruned-1", "pruned-2"]
    assert run.model.conv1.out_channels == 2


def test_every_worker_may_have_a_private_data_set_of_its_own(tmp_path):
    never, splits = {"epochs": 0}, {"scheme": "places", "files": ["digits", "digits"]}
    made = recipe("fap", private=True, splits=splits, fused=never, pruned=never,
                  fusing={"method": "moment"})  # fmt: skip
    run = intrafuse.factorize(made, tmp_path / "run")
    assert [r.images for r in run.result.records] == [1352, 1352, 0, 0]


def test_another_recipe_or_other_files_in_the_folder_are_refused(undisturbed, tmp_path):
    with pytest.raises(IntrafuseError, match="another recipe"):
        intrafuse.factorize(recipe("paf", seed=1), undisturbed["paf"].folder)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(IntrafuseError, match="new folder"):
        intrafuse.factorize(recipe("paf"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("change", [{"epochs": 5}, {"rate": 0.05}])
def test_a_recipe_file_that_was_edited_after_the_run_is_refused(undisturbed, change, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed["paf"].folder, folder)
    edited = recipe("paf", training={**TRAINING, **change})
    (folder / "recipe.yaml").write_text(edited.model_dump_json())
    with pytest.raises(IntrafuseError, match="another recipe"):
        intrafuse.factorize(edited, folder)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pruning": {"importance": "l3"}}, "unknown importance"),
        ({"pruning": {"exclude": ["nope*"]}}, "exclude"),
        ({"arguments": {"num_classes": 5}}, "10 logits"),
        ({"arguments": {"in_channels": 3}}, "images of shape"),
        (
            {"private": True, "fused": {"epochs": 0}, "pruned": {"epochs": 0},
             "pruning": {"importance": "taylor"}},
            "needs data",
        ),
    ],
)  # fmt: skip
def test_what_would_fail_after_the_training_is_refused_before(changes, rule, tmp_path):
    with pytest.raises(IntrafuseError, match=rule):
        intrafuse.factorize(recipe("fap", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"device": "gpu"}, {"retries": None}, {"parallel": 0}])
def test_wrong_settings_of_a_run_are_refused_before_it(settings, tmp_path):
    with pytest.raises(IntrafuseError, match=next(iter(settings))):
        intrafuse.factorize(recipe("whole"), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["long" * 100, "nul\0"])
def test_a_folder_that_cannot_be_read_is_refused(name, tmp_path):
    with pytest.raises(IntrafuseError, match=r"cannot be (written|read): .*(long|null)"):
        intrafuse.factorize(recipe("whole"), tmp_path / name)


def test_something_else_than_a_recipe_is_refused(tmp_path):
    with pytest.raises(IntrafuseError, match="read_recipe"):
        intrafuse.factorize("recipe.yaml", tmp_path / "run")  # type: ignore[arg-type]


MODULE = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
built = make()
"""


def test_workers_alone_read_private_data_and_find_the_modules_of_their_driver(
    tmp_path, monkeypatch
):
    """Two folds make two networks; `test_splits.py` counts the images of more."""
    (tmp_path / "users_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    folds, never = {"scheme": "k-fold", "folds": 2}, {"epochs": 0}
    made = recipe("paf", model="users_module:make", arguments={}, splits=folds, private=True,
                  fused=never, pruned=SETTINGS["pruned"])  # fmt: skip
    run = intrafuse.factorize(made, tmp_path / "run", retries=0)
    assert len(run.result.parts) == 2 and run.model[1].out_features == 8
    joint = [r for r in run.result.records if r.part == 0]
    assert joint and all(r.images == 0 for r in joint)


def test_a_model_that_is_one_module_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "users_built.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = recipe("whole", model="users_built:built", arguments={})
    run = intrafuse.factorize(made, tmp_path / "run")
    assert run.model[1].out_features == 8
    built = sys.modules["users_built"].built
    assert built[1].out_features == 16
    assert Line(tmp_path, made, 0, None, load_data("digits")).resolve().model is not built


def test_a_worker_that_fails_is_reported_with_its_log(tmp_path):
    made = recipe("fap", training={**TRAINING, "rate": 1e30})
    with pytest.raises(IntrafuseError, match=r"2 of 2 workers failed.*loss must stay finite.*log"):
        intrafuse.factorize(made, tmp_path / "run")
    log = (tmp_path / "run/parts/1/log.txt").read_text()
    assert log.count("loss must stay finite") == 2  # once more, by default


# --- faults -------------------------------------------------------------------------------------


def command(folder: Path, made: intrafuse.Recipe) -> list[str]:
    file = folder.parent / "recipe.json"
    file.write_text(made.model_dump_json())
    code = "from intrafuse.cli import main; main()"
    return [sys.executable, "-c", code, "factorize", made.scheme, "--recipe", str(file),
            "--out", str(folder), "--threads", "1"]  # fmt: skip


def workers(folder: Path) -> list[int]:
    """Find the processes that work in a run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"intrafuse.study.factorize" in words and str(folder).encode() in b" ".join(words):
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")


@needs_proc
def test_a_killed_worker_goes_on_from_its_last_epoch(undisturbed, tmp_path):
    folder = tmp_path / "run"
    driver = subprocess.Popen(command(folder, recipe("paf")), stderr=subprocess.PIPE)
    wait_for(lambda: (folder / "parts/1/trained.state").exists())
    for pid in workers(folder / "parts/1"):
        os.kill(pid, signal.SIGKILL)
    assert driver.communicate()[1] and driver.returncode == 0
    assert_equal(undisturbed["paf"].model, folder)


@needs_proc
def test_workers_end_with_the_driver_and_the_same_command_goes_on(undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = command(folder, recipe("fap"))
    driver = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    wait_for(lambda: (folder / "parts/2/trained.state").exists())
    driver.kill()
    driver.communicate()
    wait_for(lambda: not workers(folder), 10)
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert_equal(undisturbed["fap"].model, folder)


@pytest.mark.parametrize("scheme", ["whole", "paf"])
def test_broken_checkpoints_are_made_anew(undisturbed, scheme, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[scheme].folder, folder)
    for path in folder.rglob("model.safetensors"):
        if path.parent.name in ("trained", "tuned", "fused"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "result.json").write_text("{")
    again = intrafuse.factorize(recipe(scheme), folder)
    assert same_state(again.model, undisturbed[scheme].model.state_dict())
    assert_equal(again.model, folder)


def test_a_full_disk_keeps_what_is_done(undisturbed, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        folder = small / "run"
        with pytest.raises(IntrafuseError, match="No space left"):
            intrafuse.factorize(recipe("paf"), folder, retries=0)
        assert not list(folder.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        again = intrafuse.factorize(recipe("paf"), folder)
        assert same_state(again.model, undisturbed["paf"].model.state_dict())
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- Ray ----------------------------------------------------------------------------------------


def test_a_ray_cluster_that_cannot_be_reached_is_said(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    how = {"workers": "ray", "address": "no-such-scheme://127.0.0.1:1"}
    with pytest.raises(IntrafuseError, match="Ray cannot be reached"):
        intrafuse.factorize(recipe("paf"), tmp_path / "run", **how)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_network(cluster, undisturbed, tmp_path):
    scheme = "paf"
    run = intrafuse.factorize(recipe(scheme), tmp_path / "run", workers="ray", threads=1)
    assert same_state(run.model, undisturbed[scheme].model.state_dict())
    told = [(r.part, r.name, r.accuracy) for r in run.result.records]
    assert told == [(r.part, r.name, r.accuracy) for r in undisturbed[scheme].result.records]


@needs_proc
def test_a_killed_ray_worker_is_started_again(cluster, undisturbed, tmp_path):
    victims = []

    def kill(stage: str, done: int, total: int) -> None:
        if victims or not (stage.endswith("trained") and done > 30):
            return
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            if path.read_bytes().startswith(b"ray::_remote"):
                victims.append(int(path.parent.name))
                os.kill(victims[0], signal.SIGKILL)
                return

    longer = {**TRAINING, "epochs": 12}
    made = recipe("fap", training=longer)
    run = intrafuse.factorize(made, tmp_path / "ray", workers="ray", threads=1, progress=kill)
    assert victims
    plain = intrafuse.factorize(made, tmp_path / "local")
    assert same_state(run.model, plain.model.state_dict())
