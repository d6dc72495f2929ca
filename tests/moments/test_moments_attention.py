"""Moments behind attention and layer norm, and what methods make of them in transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import intrafuse
from intrafuse.methods import Moment
from tests.montecarlo import distance, found, measured, noise, seeded


class Attention(nn.Module):
    """Multi-head attention, then its output without the last layer."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.qkv, self.fused = nn.Linear(6, 24), fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).view(b, t, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 8)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("positions", [1, 5])
def test_attention_to_equal_keys_takes_the_mean_of_the_values(fused, positions):
    model = seeded(lambda: Attention(fused))
    with torch.no_grad():
        for weight in (model.k.weight, model.qkv.weight[8:16]):
            weight.zero_()
    moments = found(model, noise(2, positions, 6))
    mean, covariance = measured(model, noise(200_000 // positions, positions, 6), axis=2)
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.01)
    torch.testing.assert_close(moments.covariance, covariance, rtol=0, atol=0.01)


def test_attention_to_one_key_has_the_moments_of_its_value():
    model = seeded(lambda: Attention(fused=False))
    moments = found(model, noise(2, 1, 6))
    mean, covariance = measured(model.v, noise(100_000, 6))
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.01)
    torch.testing.assert_close(moments.covariance, covariance, rtol=0, atol=0.01)


def test_attention_to_many_keys_follows_what_queries_ask_for():
    """Approximate: logits tilt Gaussian values; far closer than the values themselves."""
    model = seeded(lambda: Attention(fused=False))
    moments = found(model, noise(2, 200, 6))
    mean, covariance = measured(model, noise(200, 200, 6), axis=2)
    values = measured(model.v, noise(100_000, 6))
    assert distance(moments.covariance, covariance) < 0.2 * distance(values[1], covariance)
    assert distance(moments.mean, mean) < 0.5 * distance(values[0], mean)


def test_equal_heads_have_equal_outputs():
    model = seeded(lambda: Attention(fused=False))
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
    covariance = found(model, noise(2, 9, 6)).covariance
    torch.testing.assert_close(covariance[:4, :4], covariance[:4, 4:])
    torch.testing.assert_close(covariance[:4, :4], covariance[4:, 4:])


def test_layer_norm_shares_the_spread_as_it_enters():
    """Approximate: each sample is divided by its own spread, not by that of all."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(0.2, 2, 64).diag())
        model[0].bias.zero_()
    moments = found(model, noise(2, 64))
    mean, covariance = measured(model, noise(50_000, 64))
    torch.testing.assert_close(moments.mean, mean, rtol=0, atol=0.05)
    assert distance(moments.covariance, covariance) < 0.1 * covariance.norm()
    gamma = model[1].weight.detach().double()
    share = moments.covariance.diagonal() / gamma.square()
    torch.testing.assert_close(share.mean(), torch.tensor(1.0).double(), rtol=1e-4, atol=0)


WORDS = torch.randint(40, (8, 7), generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """One layer of a transformer, behind its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.second = nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.split = (-1, 4)  # heads may go; with (4, -1) their width

    def forward(self, words: Tensor) -> Tensor:
        x = self.first(self.words(words))
        q, k, v = (f(x).unflatten(-1, self.split).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v)
        x = self.second(x + self.out(heads.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


def doubled(layers: tuple[nn.Linear, ...], half: int) -> None:
    """Let the second half of the outputs repeat the first."""
    with torch.no_grad():
        for layer in layers:
            layer.weight[half:] = layer.weight[:half].clone()
            layer.bias[half:] = layer.bias[:half].clone()


@pytest.mark.parametrize("transport", ["none", "folding"])
@pytest.mark.parametrize("part", ["hidden units", "heads"])
def test_what_is_there_twice_is_merged_without_loss(part, transport):
    model = seeded(Block)
    layers, half, group = {
        "hidden units": ((model.up,), 12, "up"),
        "heads": ((model.q, model.k, model.v), 8, "q#heads"),
    }[part]
    doubled(layers, half)
    words = WORDS
    old = copy.deepcopy(model)(words)
    method = Moment(transport=transport, ridge=1e-9)
    pruned = intrafuse.prune(model, words, channels=0.5, include=[group], method=method)
    torch.testing.assert_close(pruned.model(words), old, rtol=0, atol=2e-3)


def test_head_that_mixes_the_values_of_another_goes_without_loss():
    """Heads 2 and 3 attend as 0 and 1 do, and give other combinations of the same values."""
    model, words = seeded(Block), WORDS
    doubled((model.q, model.k), 8)
    mix = torch.block_diag(*torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        model.v.weight[8:], model.v.bias[8:] = mix @ model.v.weight[:8], mix @ model.v.bias[:8]
    old = copy.deepcopy(model)(words)
    method = Moment(ridge=1e-9)
    pruned = intrafuse.prune(model, words, channels=0.5, include=["q#heads"], method=method)
    assert pruned.model.q.weight.shape == (8, 16)
    torch.testing.assert_close(pruned.model(words), old, rtol=0, atol=2e-3)


class SharedWidth(Block):
    """Queries, keys and values have the same width, as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.query, self.key, self.value = self.q, self.k, self.v
        del self.q, self.k, self.v

    def forward(self, words: Tensor) -> Tensor:
        x = self.first(self.words(words))
        layers = (self.query, self.key, self.value)
        q, k, v = (f(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for f in layers)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = self.second(x + self.out(heads.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


def of_rank(model: Block | SharedWidth, rank: int) -> None:
    """Let the four outputs of each head be combinations of a few."""
    random = torch.Generator().manual_seed(3)
    for name, layer in model.named_children():
        if name in ("q", "k", "v", "query", "key", "value"):
            for head in range(4):
                rows = slice(4 * head, 4 * head + 4)
                mix = torch.randn(4, rank, generator=random)
                with torch.no_grad():
                    layer.weight[rows] = mix @ layer.weight[rows][:rank]
                    layer.bias[rows] = mix @ layer.bias[rows][:rank]


@pytest.mark.parametrize(
    ("model", "source"),
    [(SharedWidth, "analytic"), (Block, "analytic"), (Block, "calibration")],
)
def test_width_that_the_products_do_not_need_goes_without_loss(model, source):
    model, words = seeded(model), WORDS
    model.split = (4, -1)
    of_rank(model, 2)
    old = copy.deepcopy(model)(words)
    settings = {"include": ["q*#width"], "channels": 0.5, "data": [words]}
    found = [
        intrafuse.prune(model, words, method=method, **settings)
        for method in (Moment(source=source, ridge=1e-6), "select")
    ]
    torch.testing.assert_close(found[0].model(words), old, rtol=0, atol=2e-3)
    assert (found[1].model(words) - old).abs().max() > 0.05
    assert found[0].plan.apply(model)(words).equal(found[0].model(words))


@pytest.mark.parametrize("source", ["analytic", "calibration"])
def test_best_products_of_each_head_beat_selected_width(source):
    model, words = seeded(SharedWidth), WORDS
    old = copy.deepcopy(model)(words)
    moment, select = (
        intrafuse.prune(
            model, words, channels=0.5, include=["query#*"], method=method, data=[words]
        ).model(words)
        for method in (Moment(source=source), "select")
    )
    assert (moment - old).norm() < 0.8 * (select - old).norm()


class Turned(SharedWidth):
    """Queries pass through a function before they meet keys."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.first(self.words(words))
        layers = (self.query, self.key, self.value)
        q, k, v = (f(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for f in layers)
        heads = F.scaled_dot_product_attention(q.tanh(), k, v, scale=0.5)
        return x + self.out(heads.transpose(1, 2).flatten(2))


def test_width_is_selected_where_queries_are_altered_before_the_product():
    model, words = seeded(Turned), WORDS
    plan = intrafuse.plan(model, words, channels=0.5, include=["query#width"], method="moment")
    (step,) = plan.maps
    assert step.keep is not None and not step.writers


def test_plan_with_matrices_for_each_head_is_saved_and_loaded(tmp_path):
    model, words = seeded(SharedWidth), WORDS
    plan = intrafuse.plan(model, words, channels=0.5, include=["query#*"], method="moment")
    assert any(step.writers for step in plan.maps)
    plan.save(tmp_path / "plan.safetensors")
    loaded = intrafuse.Plan.load(tmp_path / "plan.safetensors")
    assert loaded.apply(model)(words).equal(plan.apply(model)(words))
