"""Data sets: known digits and pixels first, then batches, then every refusal by its message."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from intrafuse.catalog.data import DATASETS, ImageFiles, Images, load_data
from intrafuse.support.errors import IntrafuseError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny(n: int = 4, **changes) -> Images:
    base = Images(
        images=torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1),
        labels=torch.arange(n) % 2,
        classes=("even", "odd"),
        mean=(0.0,),
        std=(1.0,),
        name="tiny",
    )
    return replace(base, **changes)


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    train, test = load_data("digits", split="train"), load_data("digits")
    assert (len(train), len(test)) == (1352, 445)
    assert test.classes == tuple("0123456789") and test.input_shape == (1, 8, 8)
    assert train.labels[:10].tolist() == list(range(10))
    assert_close(
        train.images[0, 0].float() * 16 / 255,
        torch.tensor(load_digits().images[0]).float(),
        atol=0.04,
        rtol=0,
    )
    assert torch.equal(
        torch.cat([train.labels, test.labels]).bincount(),
        torch.tensor(load_digits().target).bincount(),
    )
    assert test.labels.bincount().tolist() == [44, 45, 44, 45, 45, 45, 45, 44, 43, 45]


def test_digits_have_zero_mean_and_unit_variance():
    images = load_data("digits", split="train").unlabelled(2000)
    assert len(images) == 1352 and images.dtype == torch.float32
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3


def test_digits_splits_share_no_image():
    train, test = load_data("digits", split="train"), load_data("digits")
    rows = {bytes(image.flatten().tolist()) for image in train.images}
    assert not any(bytes(image.flatten().tolist()) in rows for image in test.images)


# --- batches ------------------------------------------------------------------------------------


def test_batches_normalise_each_channel():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    data = Images(
        images=image,
        labels=torch.zeros(1, dtype=torch.int64),
        classes=("a",),
        mean=MEAN,
        std=STD,
        name="one",
    )
    ((batch, labels),) = data.batches()
    expected = (torch.tensor([0, 1, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert_close(batch.flatten(), expected)
    assert labels.tolist() == [0] and labels.dtype == torch.int64
    assert image.flatten().tolist() == [0, 255, 51]  # the pixels themselves stay


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (99, [5])]
)
def test_batches_cover_each_image_once_in_order(batch_size, sizes):
    batches = list(tiny(5).batches(batch_size))
    assert [len(labels) for _, labels in batches] == sizes
    assert_close(torch.cat([x for x, _ in batches]).flatten() * 255, torch.arange(5.0))


def test_shuffle_depends_on_the_seed_alone():
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed + 7)
        batches = list(tiny(50).batches(8, shuffle=True, seed=seed))
        drawn = (torch.cat([x for x, _ in batches]).flatten() * 255).round().long()
        assert torch.equal(torch.cat([y for _, y in batches]), drawn % 2)  # labels went along
        return drawn.tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(50))


def test_take_and_unlabelled_give_at_most_what_there_is():
    assert len(tiny(4).take(1)) == 1 and len(tiny(4).take(9)) == 4
    drawn = tiny(40).unlabelled(10, seed=3) * 255
    assert drawn.shape == (10, 1, 1, 1) and len(drawn.round().unique()) == 10
    assert torch.equal(drawn, tiny(40).unlabelled(10, seed=3) * 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny().batches(0), "batch_size must be at least 1; got 0"),
        (lambda: tiny().take(0), "at least 1; got 0"),
        (lambda: tiny().unlabelled(-1), "at least 1; got -1"),
        (lambda: tiny(labels=torch.tensor([0, 1, 2, 0])), r"0..1 \(at tiny\); got 2"),
        (lambda: tiny(labels=torch.tensor([0, -1, 1, 0])), r"0..1 \(at tiny\); got -1"),
        (lambda: tiny(labels=torch.tensor([0])), "one label each"),
        (lambda: tiny(images=torch.zeros(4, 1, 1, 1)), "uint8"),
        (lambda: tiny(std=(0.0,)), "positive"),
        (lambda: tiny(mean=MEAN), "1 numbers"),
        (lambda: tiny(0), "no images"),
    ],
)
def test_contradictions_are_refused(call, message):
    with pytest.raises(IntrafuseError, match=message):
        call()


# --- folders of images --------------------------------------------------------------------------


def write_folder(root: Path, counts: dict[str, int], *, size: int = 8) -> None:
    for level, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (10 * level, i, 0)
            Image.new("RGB", (size, size), colour).save(root / name / f"{i}.png")


def test_a_folder_gives_classes_in_turn(tmp_path):
    write_folder(tmp_path / "test", {"cat": 3, "ant": 1, "bee": 2})
    data = load_data(f"imagefolder:{tmp_path}@8")
    assert data.classes == ("ant", "bee", "cat") and data.input_shape == (3, 8, 8)
    assert data.labels.tolist() == [0, 1, 2, 1, 2, 2]
    ((batch, _),) = data.batches()
    first = batch[:, :2, 0, 0] * torch.tensor(STD[:2]) + torch.tensor(MEAN[:2])
    assert (first * 255).round().int().tolist() == [
        [10, 0], [20, 0], [0, 0], [20, 1], [0, 1], [0, 2]]  # fmt: skip
    assert load_data(f"imagefolder:{tmp_path}@8", limit=3).labels.tolist() == [0, 1, 2]


def test_images_are_resized_and_cropped_at_the_centre(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "a" / "wide.JPG", quality=100, subsampling=0)
    Image.new("L", (5, 50), 200).save(tmp_path / "a" / "grey.png")
    data = load_data(f"imagefolder:{tmp_path}@10")
    assert isinstance(data.images, ImageFiles)
    assert (data.images[torch.tensor([0, 1])].float() - 200).abs().max() <= 3
    assert load_data(f"imagefolder:{tmp_path}").input_shape == (3, 224, 224)


def test_a_folder_is_decoded_only_where_it_is_read(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "1.png").write_bytes(b"broken")
    batches = load_data(f"imagefolder:{tmp_path}@8").batches(2)
    assert next(batches)[0].shape == (2, 3, 8, 8)
    with pytest.raises(IntrafuseError, match=r"cannot be decoded.*1\.png"):
        next(batches)
    assert len(load_data(f"imagefolder:{tmp_path}@8").take(2).unlabelled(2)) == 2


def test_a_class_keeps_its_number_in_every_split(tmp_path):
    write_folder(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_folder(tmp_path / "val", {"c": 1})
    data = load_data(f"imagefolder:{tmp_path}@8")
    assert data.classes == ("a", "b", "c") and data.labels.tolist() == [2]
    assert len(load_data(f"imagefolder:{tmp_path}@8", split="train")) == 3


def test_bad_folders_are_refused(tmp_path):
    spec = f"imagefolder:{tmp_path}@8"
    with pytest.raises(IntrafuseError, match="no images"):
        load_data(spec)
    with pytest.raises(IntrafuseError, match="size must be at least 1"):
        load_data(f"imagefolder:{tmp_path}@0")
    write_folder(tmp_path / "train", {"a": 1})
    with pytest.raises(IntrafuseError, match="no subfolder test or val"):
        load_data(spec)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(IntrafuseError, match=r"no \.png or \.jpg.*empty"):
        load_data(spec, split="train")


# --- SPEC strings -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["TIFF", "BMP", "GIF", "EPS", "PDF", "ICO"])
def test_images_of_other_kinds_are_not_decoded(tmp_path, monkeypatch, form):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    write_folder(tmp_path, {"a": 1})
    path = next((tmp_path / "a").iterdir())
    Image.new("RGB", (4, 4)).save(path, form)  # under the name of a .png
    monkeypatch.setattr(subprocess, "check_call", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(IntrafuseError, match="cannot be decoded"):
        load_data(f"imagefolder:{tmp_path}@4").unlabelled(1)


@pytest.mark.parametrize(
    ("spec", "message", "usage"),
    [
        ("digit", "unknown data set; got 'digit'. Remedy: try digits", True),
        ("", "try cifar10 or cifar100 or digits", True),
        ("digits:x", "digits takes no folder", True),
        ("cifar10", "needs a folder.*cifar10:FOLDER", True),
        ("cifar100:", "needs a folder.*cifar100:FOLDER", True),
        ("cifar10:/nowhere", "does not exist; got '/nowhere'", False),
        ("imagefolder:/nowhere@64", "does not exist; got '/nowhere'", False),
        ("imagefolder:D@99999999", "at most 8192", True),
        (f"imagefolder:D@{'9' * 5000}", "at most 8192", True),
        ("imagefolder:~nobody-of-this-name/x", "does not exist", False),
        ("cifar10:~nobody-of-this-name/x", "does not exist", False),
        ("cifar10:a\0b", "does not exist", False),
        ("hf:mnist", "not supported yet; got 'hf:mnist'.*imagefolder", False),
    ],
)
def test_bad_specs_are_refused(spec, message, usage):
    with pytest.raises(IntrafuseError, match=message) as caught:
        load_data(spec)
    assert caught.value.usage is usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "val"}, "train.*got 'val'"), ({"limit": 0}, "limit must be at least 1; got 0")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(IntrafuseError, match=message):
        load_data("digits", **arguments)


def test_the_registry_lists_what_the_documentation_promises():
    assert sorted(DATASETS) == ["cifar10", "cifar100", "digits", "hf", "imagefolder"]
