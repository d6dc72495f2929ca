"""Nothing is lost and nothing is left, wherever a writer is killed or its disk fails."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import failed, killed, leftovers
from records import RECORDS
from torch import nn

import intrafuse
from intrafuse.checkpoint.folder import WEIGHTS
from intrafuse.study.factorize import factorize
from intrafuse.study.factorize.recipe import make_recipe
from intrafuse.study.factorize.splits import write_positions
from intrafuse.study.factorize.worker import POSITIONS, TASK, Task, work
from intrafuse.study.report.page import write_report
from intrafuse.study.report.record import as_record, write_record
from intrafuse.support import files
from intrafuse.support.errors import IntrafuseError

torch.set_num_threads(1)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def is_of(folder: Path, seed: int) -> bool:
    """Tell whether a saved network is that of a seed; it must load, whichever it is."""
    return torch.equal(intrafuse.load(folder, nn.Linear(3, 2)).weight, network(seed).weight)


@pytest.fixture(params=["exchange", "two renames"])
def system(request, monkeypatch):
    """Write on a system that can exchange two names, and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    elif not exchanges():
        pytest.skip("this file system cannot exchange names")


def exchanges() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        one.mkdir()
        other.touch()
        return files._exchange(one, other) and one.is_file() and other.is_dir()


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("first", ["load", "save"])
def test_a_network_that_is_replaced_is_never_lost(tmp_path, first):
    for at in itertools.count():
        folder = tmp_path / str(at) / "net"
        intrafuse.save(folder, network(0))
        came = killed(lambda folder=folder: intrafuse.save(folder, network(1)), at)
        if first == "load":
            assert is_of(folder, 0) or is_of(folder, 1)
            assert came or is_of(folder, 1)
        else:
            with pytest.raises(IntrafuseError, match="finite"):  # the next save may itself fail
                intrafuse.save(folder, nn.Linear(3, 2).requires_grad_(False).apply(spoil))
            assert folder.is_dir()
            assert is_of(folder, 0) or is_of(folder, 1)
        intrafuse.save(folder, network(2))
        assert is_of(folder, 2) and list(folder.parent.iterdir()) == [folder]
        if not came:
            break
    assert at > 10


def spoil(module: nn.Module) -> None:
    module.weight.data.fill_(torch.nan)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_that_fails_keeps_what_was_there(tmp_path, lasting):
    raising = 0
    for at in itertools.count():
        folder = tmp_path / str(at) / "net"
        intrafuse.save(folder, network(0))
        came, raised = failed(
            lambda folder=folder: intrafuse.save(folder, network(1)),
            at,
            IntrafuseError,
            lasting=lasting,
        )
        assert is_of(folder, 0 if raised else 1)
        intrafuse.save(folder, network(2))
        assert is_of(folder, 2) and list(folder.parent.iterdir()) == [folder]
        raising += raised
        if not came:
            break
    assert raising > 5


def test_the_place_of_a_folder_that_cannot_be_moved_back_is_told(tmp_path, monkeypatch):
    folder, other = tmp_path / "net", tmp_path / "moved"
    intrafuse.save(folder, network(0))
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = os.rename

    def broken(source, target):
        if Path(target) == folder and not (target.exists() and Path(source).parent.name == "new"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(IntrafuseError, match=r"cannot be moved back.*old/net.*move it to.*net"):
        intrafuse.save(folder, network(1))
    monkeypatch.undo()
    assert not folder.exists() and not other.exists()
    assert is_of(folder, 0)


def test_a_new_network_is_there_as_a_whole_or_not_at_all(tmp_path):
    for at in itertools.count():
        folder = tmp_path / str(at) / "net"
        came = killed(lambda folder=folder: intrafuse.save(folder, network(1)), at)
        assert not folder.exists() or is_of(folder, 1)
        intrafuse.save(folder, network(2))
        assert is_of(folder, 2) and list(folder.parent.iterdir()) == [folder]
        if not came:
            break


@pytest.mark.parametrize("writer", [lambda path: write_record(path, {"n": 1}), "report"])
def test_a_file_is_the_old_or_the_new_one(tmp_path, writer):
    records = tmp_path / "records"
    write_record(records / "cost.json", as_record("cost", RECORDS["cost"]))
    if writer == "report":
        pytest.importorskip("jinja2", reason="the extra plots is not installed")
        writer = partial(write_report, [records])
    writer(tmp_path / "new")  # everything is imported before the first fork
    for at in itertools.count():
        path = tmp_path / str(at) / "file"
        path.parent.mkdir()
        path.write_text("old")
        came = killed(lambda path=path: writer(path), at)
        assert path.read_bytes() in (b"old", (tmp_path / "new").read_bytes())
        write_record(path, {})
        assert list(path.parent.iterdir()) == [path]
        if not came:
            break
    assert at > 5


# --- several writers ----------------------------------------------------------------------------


def at_once(*works) -> None:
    """Run functions in threads, and raise what one of them raises."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


@pytest.mark.usefixtures("system")
def test_threads_and_processes_save_to_one_path(tmp_path):
    folder = tmp_path / "net"
    models = [network(seed) for seed in range(4)]

    def save(seed: int) -> None:
        for _ in range(5):
            intrafuse.save(folder, models[seed])

    children = []
    for seed in range(2):
        child = os.fork()
        if child == 0:
            try:
                save(seed)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    at_once(partial(save, 2), partial(save, 3))
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0, 0]
    assert any(is_of(folder, seed) for seed in range(4))
    assert list(tmp_path.iterdir()) == [folder]


def test_threads_write_one_file(tmp_path):
    path = tmp_path / "record.json"

    def write(number: int) -> None:
        for _ in range(20):
            write_record(path, {"rows": [number] * 1000})

    at_once(*(partial(write, number) for number in range(3)))
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 1000 and len(set(rows)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_writers_that_live_keep_their_stages(tmp_path):
    with files.replacing(tmp_path / "one") as temporary:
        temporary.write_text("one")
        intrafuse.save(tmp_path / "net", network(0))  # sweeps the folder
        assert temporary.read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "one"]


def test_a_reader_between_two_renames_disturbs_no_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "net"
    intrafuse.save(folder, network(0))
    rename, seen = os.rename, []

    def slow(source, target):
        rename(source, target)
        if Path(target).parent.name == "old" and not seen:
            seen.append(is_of(folder, 0))  # the reader puts it back

    monkeypatch.setattr(os, "rename", slow)
    intrafuse.save(folder, network(1))
    assert seen == [True] and is_of(folder, 1)
    assert list(tmp_path.iterdir()) == [folder]


def test_an_old_network_does_not_come_back_after_the_new_one_was_deleted(tmp_path, monkeypatch):
    """What a kill left of a save that was complete is no network that was lost."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    gone = 0
    for at in itertools.count():
        folder = tmp_path / str(at) / "net"
        intrafuse.save(folder, network(0))
        came = killed(lambda folder=folder: intrafuse.save(folder, network(1)), at)
        if is_of(folder, 1):
            shutil.rmtree(folder)
            gone += any(leftovers(folder.parent))
            with pytest.raises(IntrafuseError, match="a saved network is a folder"):
                intrafuse.load(folder, nn.Linear(3, 2))
        if not came:
            break
    assert gone


def test_names_as_long_as_can_be(tmp_path):
    name = "n" * 255
    write_record(tmp_path / name, {})
    write_record(tmp_path / name, {"n": 1})
    assert json.loads((tmp_path / name).read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_have_the_modes_that_the_umask_allows(tmp_path):
    old = os.umask(0o027)
    try:
        folder = intrafuse.save(tmp_path / "net", network(0))
        write_record(tmp_path / "record", {})
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), tmp_path / "record"]}
    assert modes == {0o640} and folder.stat().st_mode & 0o777 == 0o750


# --- factorised training ------------------------------------------------------------------------

ONCE = {"epochs": 1, "batch": 128}
SMALL = {"model": "mlp", "arguments": {"hidden": [8]}, "training": ONCE, "pruned": ONCE}
WHOLE = make_recipe({"scheme": "whole", **SMALL, "fused": ONCE})
PAF = make_recipe({"scheme": "paf", **SMALL, "fused": ONCE})


def contents(folder: Path) -> dict[str, object]:
    """List the files of a run; those of networks with their weights."""
    return {
        str(path.relative_to(folder)): path.name == WEIGHTS and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_is_killed_anywhere_goes_on_and_leaves_nothing(tmp_path, begun):
    """A sample; benchmarks/kills.py tries every file event."""
    undisturbed = tmp_path / "undisturbed"
    factorize(WHOLE, undisturbed)
    for at in itertools.count(1, 13 if begun else 31):
        folder = tmp_path / str(at)
        if begun:
            shutil.copytree(undisturbed, folder)
        came = killed(partial(factorize, WHOLE, folder), at)
        factorize(WHOLE, folder)
        assert contents(folder) == contents(undisturbed)
        if not came:
            break
    assert at > 30


def test_a_run_that_is_killed_between_a_stage_and_its_state_removes_that(tmp_path):
    folder = tmp_path / "run"
    factorize(WHOLE, folder)
    expected = contents(folder)
    (folder / "trained.state").touch()
    shutil.rmtree(folder / "network")
    factorize(WHOLE, folder)
    assert contents(folder) == expected


def test_a_worker_that_is_killed_anywhere_goes_on_and_leaves_nothing(tmp_path):
    def prepared(name: str) -> Path:
        folder = tmp_path / name
        write_positions(torch.arange(300), folder / POSITIONS)
        task = Task(recipe=PAF, part=1, threads=1)
        (folder / TASK).write_text(task.model_dump_json())
        return folder

    def say(stage: str, done: int, total: int) -> None:
        pass

    work(prepared("undisturbed"), say)
    for at in itertools.count(1, 9):
        folder = prepared(str(at))
        came = killed(lambda folder=folder: work(folder, say), at)
        work(folder, say)
        write_positions(torch.arange(300), folder / POSITIONS)  # as the next call of the run does
        assert contents(folder) == contents(tmp_path / "undisturbed")
        if not came:
            break
    assert at > 30
