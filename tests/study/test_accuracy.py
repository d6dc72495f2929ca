"""Accuracy: counted by hand, the model left alone, and trained networks on a part of CIFAR-10."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from intrafuse.catalog.data import Images, load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.support.errors import IntrafuseError


def images(labels: list[int], *, classes: int = 3) -> Images:
    """Make images of one pixel each, whose value is a class: 0, 1, 0, 1, ..."""
    pixels = torch.arange(len(labels), dtype=torch.uint8).remainder(2).view(-1, 1, 1, 1)
    names = tuple(f"class {i}" for i in range(classes))
    return Images(
        images=pixels, labels=torch.tensor(labels), classes=names, mean=(0.0,), std=(1.0,), name="x"
    )


class Reader(nn.Module):
    """Predict the class that the pixel names."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x.flatten() * 255).round().long(), 3).float()


class Broken(nn.Module):
    """Put out what it is given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


@pytest.mark.parametrize(
    ("labels", "percent"),
    [([0, 1, 0, 1], 100), ([1, 0, 1, 0], 0), ([0, 1, 0, 2, 2], 60), ([0], 100), ([2], 0)],
)
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_accuracy_counts(labels, percent, batch_size):
    assert accuracy(Reader(), images(labels), batch_size=batch_size) == percent


def test_progress_counts_images():
    calls = []
    accuracy(Reader(), images([0] * 5), batch_size=2, progress=lambda *pair: calls.append(pair))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers)


def test_the_model_is_left_as_it_was():
    model = network().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = accuracy(model, images([0, 1, 2, 0]))
    assert [m.training for m in model] == [True, False, True, True, True] and model.training
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert accuracy(model.eval(), images([0, 1, 2, 0])) == first
    assert not any(m.training for m in model.modules())


def test_training_flags_come_back_after_an_error():
    model = network().train()
    model[2].eval()
    with pytest.raises(IntrafuseError):
        accuracy(model, images([0, 1], classes=4))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy(model, images([0, 1]), progress=interrupt)
    assert [m.training for m in model] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Broken(torch.zeros(2, 10)), r"must return 3 logits .*at x.*got \(2, 10\)"),
        (Broken(torch.zeros(2, 3, 1, 1)), r"got \(2, 3, 1, 1\)"),
        (Broken((torch.zeros(2, 3),)), "got 'tuple'"),
        (Broken(torch.full((2, 3), torch.nan)), r"returns NaN \(at x\)"),
        (nn.Conv2d(3, 8, 3), r"cannot take images of shape \(1, 1, 1\)"),
        (nn.Linear(1, 3, device="meta"), "another device; got 'meta'"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, message):
    with pytest.raises(IntrafuseError, match=message):
        accuracy(model, images([0, 1]))


@pytest.mark.parametrize(
    ("name", "least", "count"),
    [("vgg11_bn", 80, 500), ("resnet18", 80, 100), ("resnet20", 74, 500)],
)
def test_trained_networks_on_cifar10(shared, name, least, count):
    model = resolve_model(name).model
    load_weights(model, shared / "models" / f"{name}_cifar10.safetensors")
    data = load_data(f"cifar10:{shared}/data/cifar10", limit=count)
    assert least < accuracy(model, data) < 95


def test_digits_resnet_learns_the_digits():
    torch.manual_seed(0)
    model, epochs = resolve_model("digits_resnet").model, 8
    train, test = load_data("digits", split="train"), load_data("digits")
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * 22)
    model.train()
    for epoch in range(epochs):
        for pixels, labels in train.batches(64, shuffle=True, seed=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            schedule.step()
    assert accuracy(model, test) > 97
