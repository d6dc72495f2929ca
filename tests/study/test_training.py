"""Training: known rates, augmentation, resuming to the same bits, and refusals."""

from __future__ import annotations

import os

import pytest
import torch
from networks import same_state
from safetensors import safe_open
from safetensors.torch import save_file

from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.training import PRESETS, Training, train
from intrafuse.study.training.augment import crop_flip
from intrafuse.study.training.state import read_state, write_state
from intrafuse.support.errors import IntrafuseError

SHORT = Training(epochs=3, rate=0.1, schedule="one-cycle", augment="crop-flip")


class Stop(Exception):
    """What a test stops a training with."""


def network(name: str = "digits_resnet"):
    torch.manual_seed(0)
    return resolve_model(name, width=0.25).model


def stopping(at: int):
    def progress(done: int, total: int) -> None:
        if done == at:
            raise Stop

    return progress


# --- settings -----------------------------------------------------------------------------------


def test_the_papers_rates():
    paper = PRESETS["paper"]
    assert [paper.rate_at(epoch, 300) for epoch in (0, 29.9, 30, 89, 90)] == [
        0.05, 0.05, 0.025, 0.0125, 0.00625,
    ]  # fmt: skip
    assert PRESETS["paper-finetune"].rate_at(60, 200) == 0.0025


def test_one_cycle_rises_to_the_rate_and_falls_to_zero():
    rates = [SHORT.rate_at(epoch / 100, 1) for epoch in range(101)]
    assert max(rates) == pytest.approx(0.1) and rates.index(max(rates)) == 30
    assert rates[0] == pytest.approx(0.004) and rates[-1] == pytest.approx(0)
    assert rates[:30] == sorted(rates[:30]) and rates[30:] == sorted(rates[30:], reverse=True)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"rate": 0}, {"batch": 0}, {"steps": 3}])
def test_settings_are_checked_when_built(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)


# --- augmentation -------------------------------------------------------------------------------


def test_images_are_shifted_and_mirrored_as_a_whole():
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).repeat(200, 2, 1, 1)
    images[:, 1] += 100
    changed = crop_flip(images, torch.Generator().manual_seed(0), most=2)
    assert changed.shape == images.shape
    seen = set()
    for image in changed:
        found = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                for mirror in (False, True):
                    source = images[0].flip(-1) if mirror else images[0]
                    expected = torch.zeros_like(source)
                    rows, columns = (slice(max(0, -s), 8 - max(0, s)) for s in (down, right))
                    to_rows, to_columns = (slice(max(0, s), 8 + min(0, s)) for s in (down, right))
                    expected[:, to_rows, to_columns] = source[:, rows, columns]
                    if torch.equal(expected, image):
                        found.append((down, right, mirror))
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 40  # of 50


# --- the loop -----------------------------------------------------------------------------------


def test_training_learns_and_depends_on_the_seed_alone():
    data = load_data("digits", split="train", limit=512)
    settings = SHORT.model_copy(update={"augment": "none", "batch": 32, "epochs": 4})
    first, second, other = (train(network(), data, settings, seed=seed) for seed in (1, 1, 2))
    assert same_state(first, second.state_dict()) and not same_state(first, other.state_dict())
    assert accuracy(first, load_data("digits")) > 60 and not first.training


@pytest.mark.parametrize("at", [1, 8, 9, 20])
def test_a_training_that_was_stopped_ends_with_the_same_bits(at, tmp_path):
    data = load_data("digits", split="train", limit=256)
    settings = SHORT.model_copy(update={"batch": 32, "weight_decay": 1e-3})
    whole = train(network(), data, settings)
    state = tmp_path / "state"
    with pytest.raises(Stop):
        train(network(), data, settings, state=state, progress=stopping(at))
    torch.rand(3)
    seen: list[int] = []
    again = train(
        network(), data, settings, state=state, progress=lambda done, total: seen.append(done)
    )
    assert same_state(again, whole.state_dict())
    assert seen[0] == max(0, (at - 1) // 8) * 8 + 1  # 8 steps an epoch


HARM = {
    "momentum": lambda tensors, told: tensors.update({"momentum.linear.bias": torch.zeros(3, 3)}),
    "epoch": lambda tensors, told: told.update(epoch="\u00b2"),
    "weights": lambda tensors, told: tensors.pop("model.linear.bias"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_state_that_was_changed_counts_as_none(harm, tmp_path):
    settings = SHORT.model_copy(update={"epochs": 2})
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=settings.momentum)
    write_state(tmp_path / "state", model, optimizer, {"a": "b"}, 1)
    with safe_open(tmp_path / "state", "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    HARM[harm](tensors, told)
    save_file(tensors, tmp_path / "state", told)
    assert read_state(tmp_path / "state", model, optimizer, {"a": "b"}) == 0


def test_a_pipe_for_a_state_counts_as_none(tmp_path):
    os.mkfifo(tmp_path / "state")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert read_state(tmp_path / "state", model, optimizer, {}) == 0


@pytest.mark.parametrize("harm", ["truncated", "other", "empty"])
def test_a_state_that_is_broken_or_anothers_counts_as_none(harm, tmp_path):
    data = load_data("digits", split="train", limit=128)
    settings, state = SHORT.model_copy(update={"epochs": 2}), tmp_path / "state"
    with pytest.raises(Stop):
        train(network(), data, settings, seed=harm == "other", state=state, progress=stopping(2))
    whole = state.read_bytes()
    state.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(harm, whole))
    seen: list[int] = []
    again = train(
        network(), data, settings, state=state, progress=lambda done, total: seen.append(done)
    )
    assert seen[0] == 1
    assert same_state(again, train(network(), data, settings).state_dict())


def test_a_last_batch_of_one_image_is_left_out():
    data = load_data("digits", split="train", limit=65)
    model = network("mlp")
    model.layers.insert(2, torch.nn.BatchNorm1d(model.layers[1].out_features))
    train(model, data, Training(epochs=1, batch=32))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_no_epochs_change_nothing():
    model = network()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, load_data("digits", limit=64), Training(epochs=0))
    assert same_state(model, state)


def test_a_loss_that_is_not_finite_is_said():
    with pytest.raises(IntrafuseError, match="loss must stay finite"):
        train(network("mlp"), load_data("digits", limit=200), Training(epochs=3, rate=1e30))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(IntrafuseError, match="device"):
        train(network(), load_data("digits", limit=64), SHORT, device=device)


def test_bfloat16_keeps_float32_weights():
    model = train(
        network(), load_data("digits", limit=64), Training(epochs=1, precision="bfloat16")
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("augment", "shape", "expected"),
    [
        ("none", (3, 32, 32), False),
        ("auto", (3, 32, 32), True),
        ("auto", (1, 8, 8), False),
        ("auto", (3, 8, 8), False),
        ("crop-flip", (1, 8, 8), True),
    ],
)
def test_automatic_augmentation_leaves_digits_alone(augment, shape, expected):
    assert Training(augment=augment).augments(shape) is expected
