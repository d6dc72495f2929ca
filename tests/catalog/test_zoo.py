"""The zoo: known parameter counts and files first, then MODEL strings, weights and refusals."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from intrafuse.catalog.zoo import ZOO, file_sha256, load_weights, resolve_model
from intrafuse.catalog.zoo.networks import ZeroPadShortcut
from intrafuse.support.errors import IntrafuseError


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the published tables, and of the files in ../shared
        ("vgg11_bn", 9_228_362),
        ("resnet18", 11_173_962),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("mlp", 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
    ],
)
def test_parameter_counts(name, parameters):
    assert count(ZOO[name].factory()) == parameters


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("width", [0.01, 0.3, 1.0])
def test_every_network_runs_at_every_width(name, width):
    resolved = resolve_model(name, width=width, num_classes=7, in_channels=2)
    (x,) = resolved.example_inputs
    assert x.shape == (1, 2, *ZOO[name].input_shape[1:])
    assert resolved.model(x).shape == (1, 7)
    assert not any(m.training for m in resolved.model.modules())
    assert resolved.arguments == {"width": width, "num_classes": 7, "in_channels": 2}


def test_a_width_scales_the_channels():
    whole, half = ZOO["resnet20"].factory(), ZOO["resnet20"].factory(width=0.5)
    assert [p.shape[0] * 2 for p in half.parameters()][:-2] == [
        p.shape[0] for p in whole.parameters()
    ][:-2]


def test_mlp_takes_other_image_sizes():
    resolved = resolve_model("mlp", image_size=5, in_channels=3, hidden=(4,))
    assert resolved.example_inputs[0].shape == (1, 3, 5, 5)
    assert [layer.in_features for layer in resolved.model.layers[1::2]] == [75, 4]


@pytest.mark.parametrize("size", [8, 7])
def test_the_option_a_shortcut_is_a_strided_slice_between_zeros(size):
    x = torch.randn(2, 16, size, size)
    y = ZeroPadShortcut(8, 8)(x)
    assert_close(y, F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 32 // 4, 32 // 4), "constant", 0))
    assert y.shape == (2, 32, 4, 4) and not y[:, :8].any() and not y[:, 24:].any()
    assert_close(y[:, 8:24], x[:, :, ::2, ::2])


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "resnet20", "resnet56"])
def test_shared_files_fit_exactly(shared, name):
    path = shared / "models" / f"{name}_cifar10.safetensors"
    model = resolve_model(name).model
    load_weights(model, path)
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        for key, tensor in model.state_dict().items():
            if key in stored:
                assert torch.equal(tensor, file.get_tensor(key)), key
    assert all(k.endswith("num_batches_tracked") for k in set(model.state_dict()) ^ stored)


# --- MODEL strings ------------------------------------------------------------------------------


def test_example_inputs_do_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = resolve_model("mlp").example_inputs[0]
    torch.manual_seed(2)
    assert torch.equal(first, resolve_model("mlp").example_inputs[0])
    assert resolve_model("resnet20", input_shape=(3, 64, 48)).example_inputs[0].shape[2:] == (
        64,
        48,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message", "usage"),
    [
        ("resnet21", {}, "unknown model; got 'resnet21'. Remedy: try .*resnet20 or", True),
        ("", {}, "unknown model; got ''.*digits_resnet.*vgg11_bn.*module:factory", True),
        ("mlp", {"depth": 3}, "mlp takes the arguments hidden, image_size, .*got 'depth'", True),
        ("mlp", {"image_size": 2.5}, "image_size must be .*got 2.5", True),
        ("mlp", {"hidden": 5}, "cannot be built.*TypeError.*got 'mlp'", False),
        ("mlp", {"width": 0}, "width must be above 0; got 0", False),
        ("mlp", {"width": float("nan")}, "width must be above 0", False),
        ("mlp", {"num_classes": 0}, r"num_classes .* at least 1 \(at mlp\); got 0", True),
        ("mlp", {"input_shape": (3, 0, 8)}, r"positive sizes .*at mlp.*got \(3, 0, 8\)", True),
        ("hf:no/such/folder", {}, "cannot be loaded .*got 'hf:no/such/folder'.*config.json", False),
        ("no_such_module:net", {}, "cannot be imported .*ModuleNotFoundError.*got 'no_such", False),
        ("torch.nn:Lineer", {}, "torch.nn has no 'Lineer'.*try Linear", False),
        ("torch.nn:Linear", {}, "cannot be built .*TypeError", False),
        ("torch.nn:Identity", {}, "shape of the model's input is unknown.*--input-shape", True),
        ("math:pi", {}, "must stand for a factory or an nn.Module", True),
        ("os:getcwd", {}, "must return an nn.Module.*got 'str'", False),
        (":net", {}, "cannot be imported", False),
    ],
)
def test_bad_names_are_refused(name, arguments, message, usage):
    with pytest.raises(IntrafuseError, match=message) as caught:
        resolve_model(name, **arguments)
    assert caught.value.usage is usage


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """Write a user's module into the current folder; give its name."""
    source = """
        import torch
        from torch import nn
        def plain(features=2): return nn.Linear(3, features)
        def known(): return nn.Linear(3, 2)
        known.example_inputs = torch.zeros(5, 3)
        class Own(nn.Module):
            example_inputs = (torch.zeros(1, 3), torch.ones(1))
            def forward(self, x, y): return x + y
        built = nn.Linear(3, 2)
        wrong = "text"
    """
    (tmp_path / "users_networks.py").write_text(re.sub(r"^ {8}", "", source, flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_networks", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield "users_networks"
    sys.modules.pop("users_networks", None)


def test_a_users_factory_is_found_in_the_current_folder(module):
    path = list(sys.path)
    resolved = resolve_model(f"{module}:plain", input_shape=(3,), features=4)
    assert resolved.model(*resolved.example_inputs).shape == (1, 4)
    assert resolved.name == f"{module}:plain" and not resolved.model.training
    assert sys.path == path


def test_a_users_example_inputs_are_taken(module):
    assert resolve_model(f"{module}:known").example_inputs[0].shape == (5, 3)
    assert [tuple(x.shape) for x in resolve_model(f"{module}:Own").example_inputs] == [(1, 3), (1,)]
    assert resolve_model(f"{module}:known", input_shape=(3,)).example_inputs[0].shape == (1, 3)


def test_a_finished_model_is_taken_as_it_is(module):
    resolved = resolve_model(f"{module}:built", input_shape=(3,))
    assert resolved.model is sys.modules[module].built
    with pytest.raises(IntrafuseError, match=r"takes no arguments.*'features': 4"):
        resolve_model(f"{module}:built", input_shape=(3,), features=4)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_missing_extra_is_named(monkeypatch, source):
    for name in [n for n in sys.modules if n.startswith(f"{source}.")]:  # other tests' imports
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(IntrafuseError, match=r'pip install "intrafuse\[zoo\]"'):
        resolve_model(f"{source}:resnet18")


# --- weights ------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return ZOO["digits_resnet"].factory(width=0.25)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(1)
    save_file(ZOO["digits_resnet"].factory(width=0.25).state_dict(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def refused(path: Path, message: str) -> None:
    """Load into a model, expect the message, and find the model as it was."""
    model = small()
    before = state(model)
    with pytest.raises(IntrafuseError, match=message):
        load_weights(model, path)
    assert_close(state(model), before, rtol=0, atol=0)


def test_weights_come_back_as_they_were_saved(saved):
    model = small()
    parameters = list(model.parameters())
    load_weights(model, str(saved))
    assert_close(dict(model.state_dict()), load_file(saved), rtol=0, atol=0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_half_precision_is_converted(saved):
    halves = {k: t.half() if t.is_floating_point() else t for k, t in load_file(saved).items()}
    save_file(halves, saved)
    model = small()
    load_weights(model, saved)
    assert model.linear.weight.dtype == torch.float32
    assert_close(model.linear.weight.data, halves["linear.weight"].float())


def test_counters_of_batch_norm_may_be_absent(saved):
    tensors = {k: t for k, t in load_file(saved).items() if "num_batches" not in k}
    save_file(tensors, saved)
    model = small()
    model.bn1.num_batches_tracked.fill_(5)
    load_weights(model, saved)
    assert model.bn1.num_batches_tracked == 5


def test_one_name_of_tied_parameters_is_enough(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    tensors = {"a.weight": torch.eye(3), "a.bias": torch.zeros(3), "b.bias": torch.ones(3)}
    save_file(tensors, tmp_path / "tied.safetensors")
    load_weights(model, tmp_path / "tied.safetensors")
    assert_close(model["b"].weight.data, torch.eye(3))


def test_all_that_does_not_fit_is_listed_sorted(saved):
    tensors = load_file(saved)
    del tensors["linear.bias"], tensors["conv1.weight"]
    tensors["zebra"] = tensors["aardvark"] = torch.zeros(1)
    tensors["zebra"] = torch.zeros(2)
    tensors["linear.weight"] = torch.zeros(3, 16)
    tensors["bn1.weight"] = torch.ones(4, dtype=torch.int64)
    save_file(tensors, saved)
    refused(
        saved,
        r"missing: conv1\.weight, linear\.bias; unexpected: aardvark, zebra; "
        r"misshapen: bn1\.weight \(file int64 \[4\], model float32 \[4\]\), "
        r"linear\.weight \(file float32 \[3, 16\], model float32 \[10, 16\]\); got .*num_classes",
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(saved, value):
    tensors = load_file(saved)
    tensors["bn1.running_var"][2] = tensors["linear.bias"][0] = value
    save_file(tensors, saved)
    refused(saved, r"finite \(at bn1\.running_var, linear\.bias\)")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_truncated_files_are_refused(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    refused(saved, "truncated or corrupt .*got .*a.safetensors")


def test_corrupt_files_are_refused(saved):
    content = saved.read_bytes()
    for broken in (b"\xff" * 200, content[:8] + b"x" + content[9:], content + b"more"):
        saved.write_bytes(broken)
        refused(saved, "truncated or corrupt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".PT", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_by_name_and_by_content(tmp_path, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zipped)
    refused(path, "nothing is unpickled.*safetensors.torch.save_file")


def test_a_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    # A header of 0x0280 bytes starts the file with 80 02, as pickles of protocol 2 do.
    header = {"weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}
    content = struct.pack("<Q", 0x0280) + json.dumps(header).encode().ljust(0x0280)
    (tmp_path / "a.safetensors").write_bytes(content + struct.pack("<f", 1.5))
    model = nn.Linear(1, 1, bias=False)
    load_weights(model, tmp_path / "a.safetensors")
    assert model.weight.item() == 1.5


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot be read .No such file.*none.safetensors")
    refused(tmp_path, "cannot be read")
    with pytest.raises(IntrafuseError, match="No such file"):
        file_sha256(tmp_path / "none")


def test_sha256_of_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
