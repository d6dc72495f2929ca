"""Saved networks: the same bits back, the manifest, full disks and kills."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from networks import covering
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

import intrafuse
from intrafuse import IntrafuseError, Plan, fold_batchnorm, load, prune, save
from intrafuse.catalog.zoo import file_sha256, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, PLAN, WEIGHTS

torch.set_num_threads(1)

ROOT = Path(intrafuse.__file__).parents[1]


def filled(model: nn.Module) -> nn.Module:
    """Give a model weights and statistics that no default could stand for."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer, under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False)]
    return dict([*named, *model.named_buffers(remove_duplicate=False)])


def require_same(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    """Ask for the same modules, the same tensors and the same outputs, bit for bit."""
    assert str(first) == str(second)
    assert_close(state(first), state(second), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second(x))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a pruned network of the zoo."""
    net = resolve_model("mlp", hidden=(8, 6))
    small = prune(filled(net.model), net.example_inputs, channels=0.5)
    return save(tmp_path / "small", small, architecture="mlp", arguments={"hidden": (8, 6)})


def fresh() -> nn.Module:
    """Build the network that `saved` was made from, with other weights."""
    return resolve_model("mlp", hidden=(8, 6)).model


# --- the same bits back -------------------------------------------------------------------------


SMALL = {"mlp": 0.1, "vgg11_bn": 0.05, "resnet18": 0.05, "resnet20": 0.3, "digits_resnet": 1}


@pytest.mark.parametrize(
    ("name", "method", "share"), covering(SMALL, ["select", "intra-fusion"], [0, 0.3, 0.99])
)
def test_a_network_of_the_zoo_comes_back(tmp_path, name, method, share):
    width = SMALL[name]
    net = resolve_model(name, width=width, num_classes=3)
    model = filled(net.model)
    small = prune(model, net.example_inputs, channels=share, method=method)
    if share == 0.99:
        assert set(small.plan.widths.values()) == {1}
    folder = save(tmp_path / "a" / "b", small, architecture=name, arguments=net.arguments)
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, MANIFEST, PLAN])
    random = torch.get_rng_state()
    (x,) = net.example_inputs
    again = load(folder)
    assert not any(module.training for module in again.modules())
    require_same(small.model, again, x)
    assert torch.equal(torch.get_rng_state(), random)
    other = resolve_model(name, width=width, num_classes=3).model.train()
    assert load(folder, other) is other
    require_same(small.model, other, x)
    assert Plan.load(folder / PLAN).widths == small.plan.widths


class Odd(nn.Module):
    """Hold tied weights, layers without bias, and buffers of many types and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.head.weight.requires_grad_(False)
        mask = torch.zeros(4).index_fill(0, torch.tensor([3]), -torch.inf)
        self.register_buffer("mask", mask, persistent=False)
        types = ["bool", "int8", "uint8", "int16", "int64", "float16", "bfloat16", "float64"]
        for name in [*types, "complex64", "complex128", "float8_e4m3fn"]:
            kind = getattr(torch, name)
            self.register_buffer(f"as_{name}", torch.arange(6).view(2, 3).to(kind))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("number", torch.tensor(5))
        self.register_buffer("absent", None)
        self.register_buffer("part", torch.arange(10.0)[2:5])
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("wide", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu()).mean((2, 3))
        return self.head(self.second(self.first(x).relu())) + self.mask


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def odd() -> Odd:
    torch.manual_seed(3)
    return Odd().eval()


def test_ties_types_layouts_and_new_biases_come_back(tmp_path):
    model = odd()
    filled_weights = torch.rand(8)
    model.norm.running_mean.copy_(filled_weights)
    small = prune(model, X, channels=0.5, exclude=["first"])
    assert small.model.conv1.bias is not None and model.conv1.bias is None
    folder = save(tmp_path / "odd", small)
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert "first.weight" in names and "second.weight" not in names
    again = load(folder, odd().train())
    require_same(small.model, again, X)
    assert again.second.weight is again.first.weight
    assert again.conv1.out_channels == 4 and again.conv1.bias.shape == (4,)
    assert again.turned.stride() == model.turned.stride()
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in small.model.parameters()
    ]
    save(folder, again, plan=Plan.load(folder / PLAN))  # over what it was loaded from
    require_same(small.model, load(folder, odd()), X)


def test_a_memory_layout_comes_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    model = model.to(memory_format=torch.channels_last)
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    again = load(save(tmp_path / "last", model), other)
    assert again[0].weight.stride() == model[0].weight.stride()
    require_same(model, again, X)


def test_removed_layers_come_back_as_identities(tmp_path):
    net = resolve_model("digits_resnet", width=0.2)
    folded = fold_batchnorm(filled(net.model), net.example_inputs, remove=True)
    folder = save(
        tmp_path / "folded", folded, architecture="digits_resnet", arguments={"width": 0.2}
    )
    again = load(folder)
    assert isinstance(again.bn1, nn.Identity) and again.conv1.bias is not None
    require_same(folded, again, net.example_inputs[0])


def test_a_network_that_was_pruned_twice_comes_back(tmp_path):
    net = resolve_model("digits_resnet", width=0.5)
    once = prune(filled(net.model), net.example_inputs, channels=0.9).model
    twice = prune(once, net.example_inputs, channels=0.5)
    folder = save(tmp_path / "x", twice, architecture="digits_resnet", arguments={"width": 0.5})
    require_same(twice.model, load(folder), net.example_inputs[0])


def test_a_tuned_network_is_saved_with_its_plan(tmp_path, saved):
    plan, tuned = Plan.load(saved / PLAN), load(saved)
    with torch.no_grad():
        tuned.layers[1].weight.add_(1)
    arguments = {"architecture": "mlp", "arguments": {"hidden": [8, 6]}}
    with pytest.raises(IntrafuseError, match=r"misshapen: layers\.1\.bias \(file float32 \[4\], "):
        save(tmp_path / "no", tuned, **arguments)
    assert not (tmp_path / "no").exists()
    again = load(save(tmp_path / "yes", tuned, plan=plan, **arguments))
    require_same(tuned, again, torch.randn(2, 1, 8, 8))
    with pytest.raises(IntrafuseError, match=r"shapes of its plan.*at layers\.1\.weight"):
        save(tmp_path / "no", fresh(), plan=plan)


def test_the_saved_plan_makes_the_saved_network(tmp_path):
    model = filled(resolve_model("digits_resnet", width=0.3).model)
    small = prune(model, torch.zeros(1, 1, 8, 8), params=0.6)
    folder = save(tmp_path / "x", small)
    again = Plan.load(folder / PLAN).apply(model)
    assert_close(state(again), state(load(folder, model)))


# --- the manifest -------------------------------------------------------------------------------


def test_the_manifest_says_how_the_network_came_to_be(tmp_path):
    net = resolve_model("mlp")
    source = tmp_path / "source.safetensors"
    save_file(net.model.state_dict(), source)
    small = prune(net.model, net.example_inputs, macs=0.4, importance="l2", seed=5)
    folder = save(
        tmp_path / "x",
        small,
        architecture="mlp",
        source_sha256=file_sha256(source),
        figures={"accuracy": 91.5},
    )
    data = json.loads((folder / MANIFEST).read_text())
    assert data["schema_version"] == 2 and data["architecture"] == "mlp"
    assert data["method"]["name"] == "intra-fusion" and data["importance"] == "l2"
    assert data["budget"]["kind"] == "macs" and data["budget"]["share"] == 0.4
    assert data["seed"] == 5 and data["figures"] == {"accuracy": 91.5}
    assert data["source_sha256"] == file_sha256(source)
    assert data["before"] == vars(small.report.before) and data["after"] == vars(small.report.after)
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["intrafuse"] == intrafuse.__version__
    assert data["files"] == {name: file_sha256(folder / name) for name in (WEIGHTS, PLAN)}
    shapes = {name: tuple(item["shape"]) for name, item in data["tensors"].items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state(small.model).items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"figures": {"accuracy": float("nan")}}, "figures must be plain JSON"),
        ({"arguments": {"x": torch.zeros(1)}}, "arguments must be plain JSON"),
        ({"source_sha256": "abc"}, "64 hexadecimal digits; got 'abc'"),
        ({"architecture": "vgg11_bn"}, "does not fit the model; missing: "),
        ({"architecture": "a\ud800"}, r"valid Unicode.*a\\ud800"),
        ({"figures": {"a\ud800": 1}}, r"valid Unicode.*a\\ud800"),
    ],
)
def test_bad_arguments_leave_no_folder(tmp_path, arguments, message):
    with pytest.raises(IntrafuseError, match=message):
        save(tmp_path / "x", nn.Linear(2, 2), **arguments)
    assert not list(tmp_path.iterdir())


def test_names_of_layers_that_a_file_can_hold_come_back_and_others_are_refused(tmp_path):
    model = nn.Sequential()
    model.add_module("a\x1b[31m\n\u202e ", nn.Linear(3, 2))
    folder = save(tmp_path / "x", model, architecture="\x1b")
    require_same(model, load(folder, copy.deepcopy(model)), torch.ones(1, 3))
    model.add_module("b\ud800", nn.Linear(2, 2))
    with pytest.raises(IntrafuseError, match=r"valid Unicode.*b\\ud800\.weight"):
        save(tmp_path / "y", model)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_not_saved(tmp_path, value):
    model = nn.Linear(2, 2)
    model.bias.data[1] = value
    with pytest.raises(IntrafuseError, match=r"must be finite.*at bias"):
        save(tmp_path / "x", model)
    assert not list(tmp_path.iterdir())


# --- writing ------------------------------------------------------------------------------------


def test_a_folder_is_replaced_as_a_whole(tmp_path, saved):
    model = nn.Linear(2, 2)
    assert save(saved, model) == saved
    assert sorted(path.name for path in saved.iterdir()) == sorted([WEIGHTS, MANIFEST])
    require_same(model, load(saved, nn.Linear(2, 2)), torch.zeros(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_files_of_others_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(IntrafuseError, match=r"other files \(thesis|is a file"):
            save(target, nn.Linear(2, 2))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_and_a_link_are_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", nn.Linear(2, 2))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / MANIFEST).exists()


@contextmanager
def file_size_limit(folder: Path) -> Iterator[Path]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("limit", [file_size_limit, tiny_disk])
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, limit):
    with limit(tmp_path) as folder:
        old = nn.Linear(3, 3)
        save(folder / "old", old)
        for name in ("old", "new"):
            with pytest.raises(IntrafuseError, match=r"cannot be written.*(too large|No space)"):
                save(folder / name, nn.Linear(300, 300))
        assert [path.name for path in folder.iterdir() if path.name != "disk"] == ["old"]
        require_same(old, load(folder / "old", nn.Linear(3, 3)), torch.ones(1, 3))


def test_a_kill_while_saving_leaves_no_folder_under_the_name(tmp_path):
    code = """
        import sys, torch, intrafuse
        model = torch.nn.Linear(4000, 5000)
        intrafuse.save(sys.argv[1], model)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "big")]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 50
        while not list(tmp_path.rglob(f"{WEIGHTS}*")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "big").exists()
    assert list(tmp_path.iterdir())
    save(tmp_path / "big", nn.Linear(2, 2))  # what the killed process left goes
    assert load(tmp_path / "big", nn.Linear(2, 2)).out_features == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "big"]
