"""Random gates, norms and reshapes: pruned by `select` they equal their masked references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import randomise
from reference import mask_channels, mask_readers, mask_writers
from torch import Tensor, nn

import intrafuse

SQUEEZES = {
    "view": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.shape[0], x.shape[1]),
    "flatten": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "squeeze": lambda x: F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1),
}
EXPANSIONS = {
    "view": lambda s, x: x * s.view(x.shape[0], x.shape[1], 1, 1),
    "index": lambda s, x: x * s[:, :, None, None],
    "unsqueeze": lambda s, x: x * s.unsqueeze(-1).unsqueeze(-1).expand_as(x),
    "reshape": lambda s, x: s.reshape(*s.shape, 1, 1) * x,
}


class Excite(nn.Module):
    """Weigh channels by what linear layers make of their means."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4), nn.Linear(4, width)
        self.squeeze = SQUEEZES[draw(st.sampled_from([*SQUEEZES]))]
        self.expand = EXPANSIONS[draw(st.sampled_from([*EXPANSIONS]))]
        self.gate = draw(st.sampled_from([torch.sigmoid, F.hardsigmoid, torch.tanh]))

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.gate(self.outer(self.inner(self.squeeze(x)).relu())), x)


class Gated(nn.Module):
    """Multiply one half of what a convolution writes by a function of the other."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(width, 12, 1), nn.Conv2d(6, width, 1)
        self.kind = draw(st.sampled_from(["glu", "chunk", "split", "simple"]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "glu":
            return self.out(F.glu(y, 1))
        if self.kind == "split":
            first, second = torch.split(y, y.shape[1] // 2, 1)
        else:
            first, second = y.chunk(2, 1)
        return self.out(first * (F.silu(second) if self.kind == "chunk" else second))


class Normed(nn.Module):
    """Normalise by groups of channels, or each channel by itself."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        kinds = {
            "group": nn.GroupNorm(2, width),
            "each": nn.GroupNorm(width, width),
            "instance": nn.InstanceNorm2d(width, affine=True),
            "tracked": nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
            "plain": nn.InstanceNorm2d(width),
        }
        self.norm = kinds[draw(st.sampled_from([*kinds]))]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Shuffled(nn.Module):
    """Interleave halves of the channels, sizes taken from the tensor."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        self.kind = draw(st.sampled_from(["view", "operator", "flip"]))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.kind == "operator":
            return F.channel_shuffle(x, 2)
        if self.kind == "flip":
            return torch.cat(x.chunk(2, 1)[::-1], 1)
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Resampled(nn.Module):
    """Trade positions for channels and back, or change their number."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        self.kind = draw(st.sampled_from(["pixels", "patches", "bilinear", "roll", "pool"]))
        self.conv = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pixels":
            return self.conv(F.pixel_unshuffle(x, 2))
        if self.kind == "patches":
            columns = F.unfold(x, 2, stride=2)
            return self.conv(columns.view(*columns.shape[:2], x.shape[2] // 2, -1))
        if self.kind == "bilinear":
            return F.interpolate(x, size=(6, 6), mode="bilinear")
        if self.kind == "roll":
            return x.roll((1, -1), (2, 3))
        return F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)


class Scaled(nn.Module):
    """A residual branch with a scale for each channel and a path that may be dropped."""

    def __init__(self, width: int, draw) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.ones(width))
        self.permuted = draw(st.booleans())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.permuted:
            y = (y.permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)
        else:
            y = y * self.gamma.view(1, -1, 1, 1)
        keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) < 0.9 if self.training else 1.0
        return x + y * keep


BLOCKS = (Excite, Gated, Normed, Shuffled, Resampled, Scaled)


class Blocks(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        width = draw(st.sampled_from([4, 8]))
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
        self.blocks = nn.ModuleList()
        for kind in kinds:
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(kind(width, draw))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.hardswish(block(F.interpolate(x, size=(8, 8)) if x.shape[-1] % 2 else x))
        return self.head(x.mean((2, 3)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 1000))
def test_select_equals_the_masked_references(data, share, seed):
    model = randomise(Blocks(data.draw), seed)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    plan = intrafuse.plan(model, x, channels=share, method="select", importance="random", seed=seed)
    pruned = plan.apply(model)
    assert plan.graph.groups
    with torch.no_grad():
        found = pruned(x)
        for mask in (mask_readers, mask_writers, mask_channels):
            torch.testing.assert_close(found, mask(model, plan)(x), rtol=1e-6, atol=1e-6)
    pruned.train()(x).sum().backward()


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.data())
def test_every_method_runs_on_every_block(kind, data):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), kind(8, data.draw), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 16, 16)
    for method in ("intra-fusion", "folding", "moment"):
        assert torch.isfinite(intrafuse.prune(body, x, channels=0.5, method=method).model(x)).all()
