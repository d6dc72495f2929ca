"""Attention in the ways that people write it, to be put together at random or one by one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("separate", "chunk", "unbind", "split", "slices")
VIEWS = ("width", "heads", "unflatten")
SCORES = ("fused", "fused constant", "root of shape", "constant", "query", "einsum", "baddbmm")
MASKS = ("none", "add", "fill", "where")
GROUPING = ("none", "expand", "interleave", "fused")
NORMS = ("layer", "rms", "rms by hand", "none")
MLPS = ("gelu", "swiglu", "glu", "chunk", "token mixing")


class HandRMS(nn.Module):
    """RMS norm as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x


class Rotary(nn.Module):
    """Cosines and sines of positions times frequencies, as HF models write them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, width, 2) / width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)
        angles = positions[:, None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    """Multi-head attention over (batch, positions, channels)."""

    def __init__(
        self,
        channels: int = 24,
        *,
        heads: int = 4,
        width: int = 6,
        projection: str = "separate",
        view: str = "width",
        scores: str = "fused",
        mask: str = "none",
        grouping: str = "none",
        rotary: bool = False,
        query_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width
        self.key_heads = heads if grouping == "none" else heads // 2
        self.projection, self.view, self.scores = projection, view, scores
        self.mask, self.grouping = mask, grouping
        self.inner, self.key_inner = heads * width, self.key_heads * width
        self.scale = width**-0.5
        if projection == "separate":
            self.q_proj = nn.Linear(channels, self.inner)
            self.k_proj = nn.Linear(channels, self.key_inner, bias=False)
            self.v_proj = nn.Linear(channels, self.key_inner)
        else:
            self.qkv = nn.Linear(channels, self.inner + 2 * self.key_inner)
        self.o_proj = nn.Linear(self.inner, channels)
        self.rotary = Rotary(width) if rotary else None
        self.q_norm = nn.LayerNorm(width) if query_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.projection == "separate":
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        h = self.qkv(x)
        if self.projection == "chunk":
            return h.chunk(3, -1)
        if self.projection == "split":
            return h.split((self.inner, self.key_inner, self.key_inner), -1)
        a, b = self.inner, self.inner + self.key_inner
        return h[..., :a], h[..., a:b], h[..., b:]

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        b, t, _ = x.shape
        if self.view == "width":
            x = x.view(b, t, -1, self.head_dim)
        elif self.view == "heads":
            x = x.view(b, t, heads, -1)
        else:
            x = x.unflatten(-1, (-1, self.head_dim))
        return x.transpose(1, 2)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        if self.projection == "unbind":
            h = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = h.unbind(0)
            return q, k, v
        q, k, v = self.project(x)
        q = self.split_heads(q, self.num_heads)
        return q, *(self.split_heads(h, self.key_heads) for h in (k, v))

    def share(self, k: Tensor) -> Tensor:
        b, h, t, d = k.shape
        if self.grouping == "expand":
            k = k[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)
        elif self.grouping == "interleave" or (self.grouping == "fused" and not self.is_fused()):
            k = k.repeat_interleave(2, 1)
        return k

    def is_fused(self) -> bool:
        return self.scores.startswith("fused")

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.queries(x)
        q = self.q_norm(q)
        if self.rotary is not None:
            cos, sin = self.rotary(x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = self.share(k), self.share(v)
        allowed = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        if self.is_fused():
            scale = self.scale if "constant" in self.scores else None
            gqa = self.grouping == "fused"
            seen = None if self.mask == "none" else allowed
            h = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=gqa)
        else:
            h = self.weights(q, k, allowed) @ v
        h = h.transpose(1, 2).reshape(b, t, -1)
        return self.o_proj(h)

    def weights(self, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        if self.scores == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        elif self.scores == "baddbmm":
            b, h, t, d = q.shape
            flat = torch.zeros(b * h, t, t, dtype=q.dtype, device=q.device)
            scores = torch.baddbmm(
                flat, q.reshape(b * h, t, d), k.reshape(b * h, t, d).mT, alpha=self.scale
            ).view(b, h, t, t)
        elif self.scores == "query":
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        elif self.scores == "root of shape":
            scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        else:
            scores = torch.matmul(q, k.mT) * self.scale
        if self.mask == "add":
            scores = scores + torch.where(allowed, 0.0, -1e9).to(scores.dtype)
        elif self.mask == "fill":
            scores = scores.masked_fill(~allowed, -1e9)
        elif self.mask == "where":
            scores = torch.where(allowed, scores, torch.full_like(scores, -1e9))
        return F.softmax(scores, -1, dtype=torch.float64).to(q.dtype)


class Mlp(nn.Module):
    """The other half of a block, plain or gated."""

    def __init__(self, channels: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "token mixing":
            self.fc1, self.fc2 = nn.Linear(5, hidden), nn.Linear(hidden, 5)
            return
        self.fc1 = nn.Linear(channels, hidden if kind in ("gelu", "swiglu") else 2 * hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.up = nn.Linear(channels, hidden) if kind == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "token mixing":
            return self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)
        if self.up is not None:
            return self.fc2(F.silu(self.fc1(x)) * self.up(x))
        h = self.fc1(x)
        if self.kind == "glu":
            return self.fc2(F.glu(h, -1))
        if self.kind == "chunk":
            a, b = h.chunk(2, -1)
            return self.fc2(F.gelu(a) * b)
        return self.fc2(F.gelu(h))


def norm(kind: str, channels: int) -> nn.Module:
    """Make a norm over the last dimension."""
    made = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms by hand": HandRMS}
    return made[kind](channels) if kind in made else nn.Identity()


class Block(nn.Module):
    """A transformer block with its norms before or after."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms: str = "layer", *, channels: int = 24
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(norms, channels), norm(norms, channels)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Tokens, blocks and a head."""

    def __init__(self, *blocks: nn.Module, channels: int = 24, norms: str = "layer") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, channels)
        self.positions = nn.Parameter(torch.zeros(1, 5, channels))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(norms, channels)
        self.head = nn.Linear(channels, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


TOKENS = torch.tensor([[1, 5, 2, 7, 3], [4, 0, 10, 6, 8]])
