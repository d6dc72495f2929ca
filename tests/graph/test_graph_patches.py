"""Pixel shuffle, patches, sampling and statistics: what they couple, and masked references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_networks import randomise
from reference import mask_readers, mask_writers
from torch import nn

import intrafuse
from intrafuse.support.errors import IntrafuseError

GRID = torch.rand(2, 4, 4, 2) * 2 - 1


class Between(nn.Module):
    """A convolution with 8 outputs, an operator, and a layer that reads what it gives."""

    def __init__(self, operator, reader: nn.Module) -> None:
        super().__init__()
        self.operator, self.conv, self.reader = operator, nn.Conv2d(3, 8, 3, padding=1), reader
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.operator(self, self.conv(x)))


# name: (operator, inputs of the reader, channels of the group that the convolution writes)
FREE = {
    "pixel shuffle": (lambda m, h: F.pixel_shuffle(h, 2), nn.Conv2d(2, 3, 1), 2),
    "pixel unshuffle": (lambda m, h: F.pixel_unshuffle(h, 2), nn.Conv2d(32, 3, 1), 8),
    "there and back": (
        lambda m, h: F.pixel_shuffle(F.pixel_unshuffle(h, 2), 2),
        nn.Conv2d(8, 3, 1),
        8,
    ),
    "channel shuffle": (lambda m, h: F.channel_shuffle(h, 2), nn.Conv2d(8, 3, 1), 4),
    "windows": (
        lambda m, h: F.unfold(h, 2, stride=2).transpose(1, 2),
        nn.Linear(32, 3),
        8,
    ),
    "windows there and back": (
        lambda m, h: F.fold(F.unfold(h, 2, stride=2), h.shape[-2:], 2, stride=2),
        nn.Conv2d(8, 3, 1),
        8,
    ),
    "sliding": (lambda m, h: h.unfold(2, 4, 2).mean(-1), nn.Conv2d(8, 3, 1), 8),
    "sampled": (
        lambda m, h: F.grid_sample(h, GRID.to(h), align_corners=False),
        nn.Conv2d(8, 3, 1),
        8,
    ),
    "reshape as": (lambda m, h: h.flatten(2).reshape_as(h), nn.Conv2d(8, 3, 1), 8),
    "moved": (lambda m, h: h.movedim(1, -1), nn.Linear(8, 3), 8),
    "moved both": (lambda m, h: h.movedim((1, 2), (3, 1)), nn.Linear(8, 3), 8),
    "instance norm": (lambda m, h: F.instance_norm(h), nn.Conv2d(8, 3, 1), 8),
    "trained instance norm": (lambda m, h: m.norm(h), nn.Conv2d(8, 3, 1), 8),
    "norm of positions": (lambda m, h: h.norm(dim=(2, 3)), nn.Linear(8, 3), 8),
    "spread of positions": (lambda m, h: torch.std_mean(h, (2, 3))[0], nn.Linear(8, 3), 8),
    "largest positions": (lambda m, h: h.flatten(2).topk(3).values.sum(-1), nn.Linear(8, 3), 8),
    "sorted positions": (lambda m, h: h.sort(3).values, nn.Conv2d(8, 3, 1), 8),
    "summed positions": (lambda m, h: h.cumsum(2), nn.Conv2d(8, 3, 1), 8),
    "turned positions": (lambda m, h: h.flip(2, 3), nn.Conv2d(8, 3, 1), 8),
    "squeezed and excited": (
        lambda m, h: h * h.mean((2, 3)).sigmoid().view(h.shape[0], -1, 1, 1),
        nn.Conv2d(8, 3, 1),
        8,
    ),
    "ceiling": (lambda m, h: F.max_pool2d(h, 3, 2, 1, ceil_mode=True), nn.Conv2d(8, 3, 1), 8),
}
X = torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FREE)
def test_channels_pass_and_equal_their_masked_references(name):
    operator, reader, channels = FREE[name]
    model = randomise(Between(operator, reader), 1)
    plan = intrafuse.plan(model, X, channels=0.5, method="select", importance="random")
    assert [*plan.graph.widths.values()] == [channels]
    pruned = plan.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(pruned(X), mask_readers(model, plan)(X))
        torch.testing.assert_close(pruned(X), mask_writers(model, plan)(X))


LOCKED = {
    "sorted channels": (lambda m, h: h.sort(1).values, "order along it matters to sort"),
    "turned channels": (lambda m, h: h.flip(1), "order along it matters to flip"),
    "norm of channels that are never zero": (
        lambda m, h: F.normalize(h.sigmoid(), dim=1),
        "linalg_vector_norm is taken over it",
    ),
    "neighbouring channels": (lambda m, h: F.local_response_norm(h, 3), "spatial"),
    "window of channels": (lambda m, h: h.unfold(1, 2, 2).flatten(1, 2), "a window slides"),
    "similar channels": (
        lambda m, h: h * F.cosine_similarity(h.cos(), h.relu(), dim=1).unsqueeze(1),
        "cosine_similarity is taken over it",
    ),
}


@pytest.mark.parametrize("name", LOCKED)
def test_locked_with_the_reason(name):
    operator, reason = LOCKED[name]
    inputs = operator(None, torch.rand(2, 8, 8, 8)).shape[1]
    graph = intrafuse.trace(Between(operator, nn.Conv2d(inputs, 3, 1)).double(), X)
    assert "conv" not in graph.by_name
    assert any(reason in " ".join(group.locked) for group in graph.locked)


def test_channels_that_blocks_of_positions_cannot_divide_are_refused_by_torch_itself():
    with pytest.raises(IntrafuseError, match="cannot be traced"):
        intrafuse.trace(Between(lambda m, h: F.pixel_shuffle(h, 3), nn.Conv2d(1, 1, 1)).double(), X)
