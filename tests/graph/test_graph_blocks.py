"""The algebra on what comes later: attention, gates, norms (ViT, Llama and UNet blocks)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import mask_readers
from torch import nn

import intrafuse


class ViTBlock(nn.Module):
    """Pre-norm attention with a packed projection, as in timm."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        h = self.norm1(x)
        qkv = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class LlamaBlock(nn.Module):
    """Grouped queries, rotary embedding, SwiGLU, RMS norm written by hand."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.repeats = heads // kv_heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.gate_proj = nn.Linear(width, 48, bias=False)
        self.up_proj = nn.Linear(width, 48, bias=False)
        self.down_proj = nn.Linear(48, width, bias=False)

    def forward(self, x, cos, sin):
        b, n, _ = x.shape
        h = self.norm1(x)
        shape = (b, n, -1, self.head_dim)
        q = rotate(self.q_proj(h).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(h).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(h).view(shape).transpose(1, 2)
        k, v = (
            t[:, :, None].expand(b, t.shape[1], self.repeats, n, self.head_dim)
            .reshape(b, -1, n, self.head_dim)
            for t in (k, v)
        )  # fmt: skip
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(h.transpose(1, 2).reshape(b, n, -1))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class UNetBlock(nn.Module):
    """Group norm, SiLU and convolutions around a shortcut, with a time embedding."""

    def __init__(self, inputs: int = 16, outputs: int = 32) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.time = nn.Linear(8, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def inputs_of(model: nn.Module):
    torch.manual_seed(0)
    if isinstance(model, ViTBlock):
        return (torch.randn(2, 5, 24),)
    if isinstance(model, LlamaBlock):
        return (torch.randn(2, 5, 32), torch.randn(5, 8), torch.randn(5, 8))
    return (torch.randn(2, 16, 6, 6), torch.randn(2, 8))


PRUNED = {
    ViTBlock: {"fc1": 96},
    LlamaBlock: {"gate_proj": 48},
    UNetBlock: {"conv1": 8},  # the groups of the second norm, four channels each
}


@pytest.mark.parametrize("block", PRUNED)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_inner_channels_are_pruned_and_equal_the_masked_block(block, share):
    torch.manual_seed(1)
    model = block().eval()
    x = inputs_of(model)
    plan = intrafuse.plan(model, x, channels=share, method="select")
    found = {group.name: group.size for group in plan.graph.groups}
    for name, size in PRUNED[block].items():
        assert found[name] == size
    with torch.no_grad():
        torch.testing.assert_close(
            plan.apply(model)(*x), mask_readers(model, plan)(*x), rtol=1e-5, atol=1e-5
        )


def groups_by_layer(model: nn.Module):
    graph = intrafuse.trace(model, inputs_of(model))
    return {layer: [g for g in (*graph.groups, *graph.locked) if layer in g.layers]
            for layer in (name for name, _ in model.named_modules() if name)}  # fmt: skip


def test_packed_heads_are_a_group_with_block_structure():
    heads, width = groups_by_layer(ViTBlock())["qkv"][-2:]
    assert (heads.size, width.size) == (4, 6)
    slot = heads.writers[0]
    (block,) = slot.blocks
    assert (slot.parameter, block.inner, block.outer) == ("qkv.weight", 6, ((3, 24),))
    assert [s.parameter for s in heads.readers] == ["proj.weight"]
    assert heads.locked and width.locked


def test_grouped_query_heads_are_found():
    found = groups_by_layer(LlamaBlock())
    sizes = {g.name.partition("#")[2]: (g.size, bool(g.locked)) for g in found["q_proj"]}
    assert sizes["heads"] == (2, False)  # key-value heads, each with its query heads
    assert sizes["heads#2"] == (2, True)  # the query heads of one key-value head
    assert sizes["width"] == (4, True)  # cosines and sines are inputs: their width is given


def test_the_residual_stream_of_a_block_stays_because_it_enters_and_leaves():
    for block, layer in ((ViTBlock, "proj"), (LlamaBlock, "o_proj")):
        (stream,) = [g for g in groups_by_layer(block())[layer] if g.writers[0].axis == 0]
        assert stream.normed and stream.locked == ("model input", "model output")
