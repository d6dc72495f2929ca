"""Files that are no files, or ask for too much: every reader refuses them at once, in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from intrafuse import IntrafuseError, Plan, load
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import ZOO, file_sha256, load_weights, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, WEIGHTS
from intrafuse.checkpoint.manifest import signed
from intrafuse.study.evaluate.landscape import _Kept
from intrafuse.study.factorize.recipe import Splits, read_recipe
from intrafuse.study.factorize.result import RESULT, read_result
from intrafuse.study.factorize.splits import read_positions, split
from intrafuse.study.report.read import read_entries
from intrafuse.support.reading import MOST_BYTES, MOST_LEVELS, parse_json, read_json

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Stop a test that waits for a pipe, or builds what a file asks for."""

    def stop(*_: object) -> None:
        pytest.fail("it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


def change(folder: Path, **fields: object) -> None:
    """Set fields of a manifest, and sign it anew."""
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(signed({**data, **fields})))


# --- what is no ordinary file ---------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(2, 2)


READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda path: load_weights(linear(), path),
    "hash": file_sha256,
    "plan": Plan.load,
    "recipe": read_recipe,
    "record": lambda path: read_entries([path]),
    "state": lambda path: _Kept(path, "x"),
    "positions": read_positions,
    "positions in text": lambda path: read_positions(path.rename(path.with_suffix(".txt"))),
}
NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": lambda path: path.mkdir(),
    "circle": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path, monkeypatch, reader, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.npy"
    NO_FILES[kind](path)
    if (reader, kind) == ("state", "circle"):
        pytest.skip("a link to nothing is where a new state may be written")
    with pytest.raises(IntrafuseError):
        READERS[reader](path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
@pytest.mark.parametrize("reader", [name for name in READERS if "text" not in name])
def test_names_that_no_file_can_have_are_refused(tmp_path, reader, name):
    if reader != "state":  # whose file need not exist
        with pytest.raises(IntrafuseError):
            READERS[reader](tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_pipe_in_a_saved_folder_is_refused(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(IntrafuseError, match="cannot be read"):
        load(saved)


def test_a_pipe_where_a_run_was_is_refused(tmp_path):
    os.mkfifo(tmp_path / RESULT)
    with pytest.raises(IntrafuseError, match="cannot be read"):
        read_result(tmp_path)


def test_a_pipe_among_parquet_shards_is_refused(tmp_path):
    os.mkfifo(tmp_path / "test-0.parquet")
    with pytest.raises(IntrafuseError, match="not parquet"):
        load_data(f"cifar10:{tmp_path}")


# --- JSON -----------------------------------------------------------------------------------------

JSON = {
    "deep": ("[" * 200 + "]" * 200, "levels"),
    "deeper": ("[" * 100_000, "deeply"),
    "deep mappings": ('{"a":' * 150 + "1" + "}" * 150, "levels"),
    "NaN": ("[NaN]", "no number"),
    "infinity": ("[-Infinity]", "no number"),
    "overflow": ("[1e999]", "no number"),
    "5,000 digits": ("[" + "9" * 5000 + "]", "64 bits"),
    "65 bits": (f"[{2**64}]", "64 bits"),
    "negative": (f"[{-(2**63) - 1}]", "64 bits"),
    "twins": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c'"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_two_readers_may_understand_in_two_ways_is_refused(tmp_path, case):
    text, rule = JSON[case]
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rule):
        read_json(tmp_path / "x.json")


def test_json_within_the_bounds_is_read():
    deep = "[" * (MOST_LEVELS - 1) + "1" + "]" * (MOST_LEVELS - 1)
    assert json.dumps(parse_json(deep)) == deep
    assert parse_json(f"[{2**64 - 1}, {-(2**63)}, 1e308]") == [2**64 - 1, -(2**63), 1e308]
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json("[Infinity]", infinite=True) == [float("inf")]


def test_a_text_file_without_end_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "x.json")


# --- what a manifest asks for ---------------------------------------------------------------------


def peak() -> int:
    """Read the most bytes that this process has held, and forget them."""
    text = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({"hidden": [20_000_000, 4]}, False),
        ({"hidden": [8, 6], "width": 1e6}, False),
        ({"hidden": [20_000_000, 2]}, True),
        ({"hidden": [8, 6], "image_size": 2**31}, True),
        ({"hidden": [8, 6], "image_size": 100_000}, True),
        ({"hidden": [8, 6], "num_classes": 2**40}, True),
        ({"hidden": [1] * 1_000_000}, True),
        ({"hidden": "a" * 1000, "width": 1_000_000}, True),
        ({"hidden": [[1] * 100_000] * 10}, True),
        ({"hidden": {"a": 1}}, True),
        ({"hidden": [8, -6]}, True),
        ({"hidden": [8, 6], "width": True}, True),
        ({"hidden": [8, 6], "width": 1e308}, True),
    ],
)
def test_a_manifest_decides_over_no_memory_and_no_time(saved, arguments, refused):
    change(saved, arguments=arguments)
    peak()
    before, started = peak(), time.process_time()
    with pytest.raises(IntrafuseError) if refused else nullcontext():
        assert load(saved).layers[1].weight.shape == (4, 64)  # only pruned from more
    assert peak() - before < 128 * 2**20 and time.process_time() - started < 2


def test_a_small_network_of_a_huge_architecture_takes_only_its_own_memory(saved):
    data = json.loads((saved / MANIFEST).read_text())
    for name in ("layers.1.weight", "layers.1.bias", "layers.3.weight"):
        data["tensors"][name]["pruned_axes"] = [0, 1][: len(data["tensors"][name]["shape"])]
    change(saved, tensors=data["tensors"], arguments={"hidden": [20_000_000, 6]})
    peak()
    before, state = peak(), torch.random.get_rng_state()
    model = load(saved)
    assert peak() - before < 128 * 2**20
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.layers[1].weight.shape == (4, 64) and not model.training
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"removed_layers": ["layers.2"]}, "digest differs"),
        ({"attributes": {"layers.1": {"out_features": 7}}}, "digest differs"),
        ({"aliases": {"layers.1.bias": "layers.5.bias"}}, "digest differs"),
        ({"schema_version": 1}, "digest differs"),
        ({"digest": "0" * 64}, "digest differs"),
        ({"digest": None}, "digest differs"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(saved, fields, rule):
    data = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**data, **fields}))
    with pytest.raises(IntrafuseError, match=rule):
        load(saved)


def test_a_manifest_of_the_first_version_is_read(saved):
    expected = load(saved)
    data = json.loads((saved / MANIFEST).read_text())
    del data["digest"]
    (saved / MANIFEST).write_text(json.dumps({**data, "schema_version": 1}))
    assert str(load(saved)) == str(expected)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"aliases": {"layers.3.bias": "layers.3.bias"}}, "contradicts itself.*layers.3.bias"),
        ({"removed_layers": ["layers.1"]}, "contradicts itself.*layers.1.bias"),
        ({"removed_layers": ["layers.2", "layers.2"]}, None),
    ],
)
def test_a_manifest_that_contradicts_itself_changes_no_model(saved, fields, rule):
    change(saved, **fields)
    model = resolve_model("mlp", hidden=(8, 6)).model
    before, text = {n: (t, t.clone()) for n, t in model.named_parameters()}, str(model)
    if rule is None:
        assert isinstance(load(saved, model).layers[2], nn.Identity)
        return
    with pytest.raises(IntrafuseError, match=rule):
        load(saved, model)
    assert str(model) == text
    for name, tensor in model.named_parameters():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


def test_a_model_on_the_meta_device_takes_a_saved_network(saved):
    with torch.device("meta"):
        model = ZOO["mlp"].factory(hidden=(8, 6))
    assert torch.equal(load(saved, model).layers[1].weight, load(saved).layers[1].weight)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight",
    [
        torch.full((2, 2), float("nan")).to(torch.float8_e4m3fn),
        torch.full((2, 2), float("inf")).to(torch.float8_e5m2),
        torch.full((2, 2), 1e300, dtype=torch.float64),  # infinite as float32
        torch.ones(2, 2, dtype=torch.complex64),
    ],
)
def test_weights_that_the_model_cannot_hold_are_refused(tmp_path, weight):
    model = linear()
    before = model.weight.clone()
    save_file({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(IntrafuseError, match=r"finite|misshapen"):
        load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.weight, before)


def test_complex_numbers_are_no_counters(tmp_path):
    model = nn.BatchNorm1d(2)
    tensors = {**model.state_dict(), "num_batches_tracked": torch.tensor(1j)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(IntrafuseError, match="misshapen: num_batches_tracked"):
        load_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "X", 3, None])
def test_odd_types_in_a_header_are_refused(tmp_path, kind):
    header = {"weight": {"dtype": kind, "shape": [2, 2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    with pytest.raises(IntrafuseError):
        load_weights(linear(), tmp_path / "w.safetensors")


# --- recipes, positions, data sets ----------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}]\n" for i in range(9)
)
BASE = "scheme: fap\nmodel: mlp\n"
RECIPES = {
    "laughs": (LAUGHS, "aliases"),
    "merge": (BASE + "training: &t {epochs: 1}\nfused: {<<: *t}", "aliases"),
    "tag": (BASE + "data: !!python/object/apply:os.system [ls]", "tags"),
    "broken timestamp": (BASE + "data: !!timestamp x", "tags"),
    "deep": (
        BASE + "arguments: {hidden: " + "[" * 3000 + "]" * 3000 + "}",
        r"levels|level exceeded",
    ),
    "deep blocks": (
        BASE + "arguments:\n" + "".join("  " * i + " a:\n" for i in range(150)),
        "levels",
    ),
    "5,000 digits": (BASE + "seed: " + "9" * 5000, "recipe"),
    "hexadecimal": (BASE + "seed: 0x" + "f" * 5000, "recipe"),
    "65 bits": (BASE + f"arguments: {{width: {2**65}}}", "64 bits"),
    "no digit": (BASE + "seed: 0b_", "recipe"),
    "no date": (BASE + "data: 2020-99-99", "recipe"),
    "a date": (BASE + "data: 2020-01-01", "recipe"),
    "twice": (BASE + "seed: 1\nseed: 2", "twice"),
    "twice inside": (BASE + "splits: {folds: 2, folds: 4}", "twice"),
    "half a pair": (BASE + r'data: "\ud800"', "surrogates|Unicode"),
    "infinite": (BASE + "splits: {scheme: dirichlet, alpha: .inf}", "splits.alpha"),
    "40 folds": (BASE + "splits: {scheme: k-fold, folds: 40}", "at most 12 folds"),
    "more folds": (BASE + f"splits: {{scheme: k-fold, folds: {10**12}}}", "at most 12 folds"),
    "steps": (BASE + "pruning: {steps: 100000000}", "steps"),
    "large": (BASE + "#" * 2**21, "bytes"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_ask_for_too_much_are_refused(tmp_path, case):
    text, rule = RECIPES[case]
    (tmp_path / "r.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(IntrafuseError, match=rule):
        read_recipe(tmp_path / "r.yaml")
    assert time.process_time() - started < 2


def test_the_most_folds_can_be_split():
    assert len(split(Splits(scheme="k-fold", folds=12), torch.zeros(50, dtype=torch.int64))) == 924
    with pytest.raises(ValueError, match="12 folds"):
        Splits(scheme="k-fold", folds=14)


@pytest.mark.parametrize("content", [f"1\n{2**64}", "9" * 5000, "1.5", "x"])
def test_broken_positions_in_text_are_refused(tmp_path, content):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(IntrafuseError, match="positions"):
        read_positions(tmp_path / "p.txt")


def test_broken_positions_in_npy_are_refused(tmp_path):
    np.savez(tmp_path / "z.npz", a=np.arange(3))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    header = (
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    )
    (tmp_path / "h.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    for name in ("z.npy", "o.npy", "h.npy"):
        with pytest.raises(IntrafuseError, match="positions cannot be read"):
            read_positions(tmp_path / name)
    np.save(tmp_path / "good.npy", np.arange(3))
    assert read_positions(tmp_path / "good.npy").tolist() == [0, 1, 2]
