"""Folders that `load` refuses: every way in which a saved network can be bad."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from intrafuse import IntrafuseError, load
from intrafuse.catalog.zoo import file_sha256, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, WEIGHTS
from intrafuse.checkpoint.manifest import signed

torch.set_num_threads(1)


def fresh() -> nn.Module:
    """Build the network that `saved` was made from, with other weights."""
    return resolve_model("mlp", hidden=(8, 6)).model


def state(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Make a function that changes the manifest of a folder."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(signed(data)))

    return apply


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Make a function that changes the weights of a folder, with a manifest that agrees."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        digest = file_sha256(folder / WEIGHTS)
        edit(lambda data: data["files"].update({WEIGHTS: digest}))(folder)

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Make a function that keeps the first bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip_last_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def pickle_weights(folder: Path) -> None:
    torch.save({"layers.1.weight": torch.zeros(4, 64)}, folder / WEIGHTS)


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def tensor_of(data: dict) -> dict:
    return data["tensors"]["layers.1.bias"]


BAD = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "weights cannot be read"),
    "empty manifest": (cut(MANIFEST, 0), "manifest is truncated or corrupt"),
    "short manifest": (cut(MANIFEST, 500), "manifest is truncated or corrupt"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\x80\x04\xff"), "corrupt"),
    "deep manifest": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "corrupt"),
    "a list": (lambda f: (f / MANIFEST).write_text("[1]"), "holds no schema_version"),
    "no version": (edit(lambda d: d.pop("schema_version")), "holds no schema_version"),
    "true version": (edit(lambda d: d.update(schema_version=True)), "holds no schema_version"),
    "next version": (edit(lambda d: d.update(schema_version=3)), r"version 2 .*got 3.*upgrade"),
    "no tensors": (edit(lambda d: d.pop("tensors")), "corrupt .tensors: Field required"),
    "more fields": (edit(lambda d: d.update(code="import os")), "corrupt .code: Extra"),
    "text for size": (edit(lambda d: tensor_of(d).update(shape=["4"])), "corrupt .tensors"),
    "negative size": (edit(lambda d: tensor_of(d).update(shape=[-4])), "corrupt .tensors"),
    "other shape": (edit(lambda d: tensor_of(d).update(shape=[5])), r"disagree.*layers\.1\.bias"),
    "other type": (edit(lambda d: tensor_of(d).update(dtype="int8")), r"disagree.*layers\.1\.bias"),
    "complex": (edit(lambda d: tensor_of(d).update(dtype="complex128")), "disagree"),
    "tensor too few": (edit(lambda d: d["tensors"].pop("layers.1.bias")), "disagree"),
    "tensor too many": (edit(lambda d: d["tensors"].update(z=tensor_of(d))), "disagree.*at z"),
    "short weights": (cut(WEIGHTS, 200), "truncated or corrupt"),
    "empty weights": (cut(WEIGHTS, 0), "truncated or corrupt"),
    "flipped bit": (flip_last_byte, "SHA-256 differs"),
    "pickle": (pickle_weights, "nothing is unpickled"),
    "huge header": (huge_header, "truncated or corrupt"),
    "NaN": (rewrite(lambda t: t["layers.1.bias"].fill_(torch.nan)), r"finite.*layers\.1\.bias"),
    "Inf": (rewrite(lambda t: t["layers.5.weight"].fill_(torch.inf)), r"finite.*layers\.5\.weight"),
    "alias to nothing": (edit(lambda d: d["aliases"].update({"layers.5.bias": "q"})), "missing: q"),
    "unknown alias": (
        edit(lambda d: d["aliases"].update({"q.bias": "layers.5.bias"})),
        "unexpected: q.bias",
    ),
    "tie of other shape": (
        edit(lambda d: d["aliases"].update({"layers.1.weight": "layers.5.bias"})),
        "misshapen",
    ),
    "unknown layer": (edit(lambda d: d["attributes"].update(q={"x": 1})), "no x .at q"),
    "new attribute": (edit(lambda d: d["attributes"].update({"": {"forward": 1}})), "no forward"),
    "true attribute": (edit(lambda d: d["attributes"].update({"": {"training": 1}})), "training"),
    "text attribute": (edit(lambda d: d["attributes"].update({"": {"x": "1"}})), "corrupt"),
    "remove unknown": (edit(lambda d: d.update(removed_layers=["q"])), "no such layer .at q"),
    "remove all": (edit(lambda d: d.update(removed_layers=[""])), "no such layer"),
    "own shape": (edit(lambda d: tensor_of(d).update(pruned_axes=[])), "misshapen: layers"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_folder_is_refused_and_the_model_untouched(saved, case):
    break_it, message = BAD[case]
    break_it(saved)
    model = fresh().train()
    before = {name: (tensor, tensor.clone()) for name, tensor in state(model).items()}
    text = str(model)
    with pytest.raises(IntrafuseError, match=message):
        load(saved, model)
    with pytest.raises(IntrafuseError, match=message):
        load(saved)
    assert str(model) == text and all(module.training for module in model.modules())
    for name, tensor in state(model).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


def test_all_keys_that_do_not_fit_are_listed_in_order(saved):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Identity(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)])
    model.a = nn.Linear(1, 1)
    with pytest.raises(IntrafuseError) as caught:
        load(saved, model)
    text = str(caught.value)
    assert "missing: a.bias, a.weight;" in text
    assert "unexpected: layers.5.bias, layers.5.weight;" in text
    assert "misshapen: layers.1.weight (file float32 [4, 64], model float32 [8, 3])." in text


@pytest.mark.parametrize("name", ["file.pt", "absent"])
def test_what_is_no_folder_is_refused(tmp_path, name):
    torch.save({}, tmp_path / "file.pt")
    with pytest.raises(IntrafuseError, match="is a folder, and nothing is unpickled"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "architecture", ["evil_module:build", "torchvision:resnet18", "timm:resnet18", "unknown", None]
)
def test_no_code_that_a_manifest_names_is_imported(saved, monkeypatch, architecture):
    (saved.parent / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(saved.parent)
    monkeypatch.syspath_prepend(saved.parent)
    edit(lambda data: data.update(architecture=architecture))(saved)
    with pytest.raises(IntrafuseError, match=r"only architectures of the zoo.*pass it as model="):
        load(saved)
    assert load(saved, fresh()).layers[1].out_features == 4


@pytest.mark.parametrize("arguments", [{"name": 1}, {"q": 1}, {"hidden": 3}, {"width": "x"}])
def test_arguments_that_the_zoo_does_not_take_are_refused(saved, arguments):
    edit(lambda data: data.update(arguments=arguments))(saved)
    with pytest.raises(IntrafuseError):
        load(saved)
