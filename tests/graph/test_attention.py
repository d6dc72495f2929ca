"""Attention: what may be pruned, and that it equals the masked reference however it is written."""

from __future__ import annotations

import pytest
import torch
from attention_networks import (
    GROUPING,
    MASKS,
    MLPS,
    PROJECTIONS,
    SCORES,
    TOKENS,
    VIEWS,
    Attention,
    Block,
    Classifier,
    Mlp,
)
from random_networks import randomise
from reference import mask_channels
from torch import nn

import intrafuse
from intrafuse.graph import trace


def network(mlp: str = "gelu", norms: str = "layer", **attention) -> nn.Module:
    return randomise(
        Classifier(Block(Attention(**attention), Mlp(24, 10, mlp), norms), norms=norms), 1
    )


def pruned_like_masked(model: nn.Module, inputs=TOKENS, **settings) -> intrafuse.Pruned:
    """Prune half of every group, and hold the result against the masked reference."""
    result = intrafuse.prune(model, inputs, **{"channels": 0.5, "method": "select"} | settings)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        expected = mask_channels(model, result.plan)(*inputs)
        torch.testing.assert_close(result.model(*inputs), expected, rtol=1e-8, atol=1e-8)
    return result


def sizes(graph) -> dict[str, int]:
    return {group.name.removeprefix("blocks.0."): group.size for group in graph.groups}


WRITINGS = [
    *({"projection": name} for name in PROJECTIONS),
    *({"view": name} for name in VIEWS),
    *({"scores": name, "rotary": i % 2 == 0} for i, name in enumerate(SCORES)),
    *({"mask": name, "scores": "constant"} for name in MASKS),
    *({"grouping": name, "projection": "slices", "scores": "root of shape"} for name in GROUPING),
    {"mask": "add"},
    {"rotary": True, "projection": "unbind"},
]


@pytest.mark.parametrize("writing", WRITINGS, ids=lambda kw: " ".join(map(str, kw.values())))
def test_heads_and_their_width_are_pruned(writing):
    result = pruned_like_masked(network(**writing))
    found = sizes(result.plan.graph)
    heads = [size for name, size in found.items() if "#heads" in name]
    width = [size for name, size in found.items() if "q" in name and "#width" in name]
    assert heads == [2 if writing.get("grouping", "none") != "none" else 4]
    assert width == [3 if writing.get("rotary") else 6]  # rotated channels go in pairs
    assert all(result.plan.widths[g.name] == g.size // 2 for g in result.plan.graph.groups)


def test_query_key_and_value_widths_are_two_groups_where_the_code_allows():
    graph = trace(network(view="heads"), TOKENS)
    groups = {name.removeprefix("blocks.0.attention."): g for name, g in graph.by_name.items()}
    layers = {slot.layer.rpartition(".")[2] for slot in groups["q_proj#width"].slots}
    assert layers == {"q_proj", "k_proj"}
    layers = {slot.layer.rpartition(".")[2] for slot in groups["v_proj#width"].slots}
    assert layers == {"v_proj", "o_proj"}
    assert groups["q_proj#width"].chosen == ("a product of two activations sums over it",)
    assert groups["v_proj#width"].chosen == ()  # values are read linearly


def test_attributes_follow():
    result = pruned_like_masked(network(scores="constant"))
    attention = result.model.get_submodule("blocks.0.attention")
    assert (attention.num_heads, attention.head_dim, attention.q_proj.out_features) == (2, 3, 6)
    assert attention.scale == 6**-0.5  # a constant of the code, and the products are as before


def test_a_scale_that_follows_the_width_is_made_up_for_by_the_queries():
    model = network(scores="root of shape")
    result = pruned_like_masked(model, exclude=["*#heads", "*fc1"])
    (step,) = result.plan.maps
    keep = (torch.arange(4)[:, None] * 6 + step.keep).ravel()
    attention, old = (m.get_submodule("blocks.0.attention") for m in (result.model, model))
    ratio = (3 / 6) ** 0.5
    torch.testing.assert_close(attention.q_proj.weight, old.q_proj.weight[keep] * ratio)
    torch.testing.assert_close(attention.k_proj.weight, old.k_proj.weight[keep])


def test_a_norm_of_queries_alone_cannot_make_up_for_the_scale_of_attention():
    graph = trace(network(query_norm=True), TOKENS)
    (locked,) = (g for g in graph.locked if g.name.endswith("q_proj#width"))
    assert locked.normed and "its size enters the scale of attention" in locked.locked
    assert "blocks.0.attention.q_proj#heads" in graph.by_name


@pytest.mark.parametrize("kind", MLPS)
def test_hidden_units_are_pruned(kind):
    result = pruned_like_masked(network(mlp=kind))
    assert result.plan.widths["blocks.0.mlp.fc1"] == 5


@pytest.mark.parametrize("norms", ["layer", "rms", "rms by hand"])
def test_the_residual_stream_stays_unless_its_name_is_included(norms):
    model = network(norms=norms)
    (stream,) = (g for g in trace(model, TOKENS).locked if g.name == "embed#normed")
    assert stream.locked[0].startswith("a norm takes its statistics over it")
    plan = intrafuse.plan(model, TOKENS, channels=0.5, method="select", include=["*#normed"])
    assert plan.widths["embed#normed"] == stream.size // 2
    assert intrafuse.verify(model, plan).relative < 1e-5


def test_the_residual_stream_is_free_without_norms():
    result = pruned_like_masked(network(norms="none"))
    assert result.plan.widths["embed"] == 12


@pytest.mark.parametrize("method", ["intra-fusion", "folding", "moment", "auto"])
def test_merging_methods_choose_heads_and_queries_and_may_merge_the_rest(method):
    model = network(view="heads")
    plan = intrafuse.plan(model, TOKENS, channels=0.5, method=method)
    selected = {step.group.rpartition(".")[2]: step.keep is not None for step in plan.maps}
    assert selected["q_proj#heads"]
    assert selected["q_proj#width"] == (method != "moment")  # which gives each head its products
    assert torch.isfinite(plan.apply(model)(TOKENS)).all()
    if method in ("intra-fusion", "folding", "moment"):
        assert not selected["v_proj#width"] and not selected["fc1"]


class Experts(nn.Module):
    """A dense mixture of experts, written with einsum and weights of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(24, 3)
        self.up = nn.Parameter(torch.zeros(3, 24, 10))
        self.down = nn.Parameter(torch.zeros(3, 10, 24))

    def forward(self, x):
        h = torch.relu(torch.einsum("bth,ehi->btei", x, self.up))
        y = torch.einsum("btei,eih->bteh", h, self.down)
        return (y * self.gate(x).softmax(-1).unsqueeze(-1)).sum(2)


def test_experts_lose_inner_width():
    model = randomise(Classifier(Block(Attention(), Experts())), 2)
    result = pruned_like_masked(model, include=["blocks.0.mlp"])
    assert list(result.plan.widths.values()).count(5) == 1
    assert result.model.get_submodule("blocks.0.mlp").up.shape == (3, 24, 5)
    (locked,) = (g for g in result.plan.graph.locked if g.size == 3 and "mlp" in g.name)
    assert any("taken over it" in reason for reason in locked.locked)


def test_removing_nothing_changes_nothing():
    model = network(rotary=True, scores="root of shape")
    small = intrafuse.prune(model, TOKENS, channels=0.0, method="select").model
    assert torch.equal(small(TOKENS), model(TOKENS))


def test_a_plan_of_attention_survives_its_file(tmp_path):
    model = network(scores="root of shape", grouping="expand")
    plan = intrafuse.plan(model, TOKENS, channels=0.5, method="select")
    plan.save(tmp_path / "plan.safetensors")
    again = intrafuse.Plan.load(tmp_path / "plan.safetensors")
    assert again.graph.rescales == plan.graph.rescales != ()
    assert [g.chosen for g in again.graph.groups] == [g.chosen for g in plan.graph.groups]
    assert torch.equal(again.apply(model)(TOKENS), plan.apply(model)(TOKENS))


def test_a_size_that_the_code_holds_is_found_by_trial_and_locked():
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x).view(-1, 3, 4).flatten(1)
            return self.c(self.b(h).view(x.shape[0], self.b.out_features))

    graph = trace(randomise(Literal(), 0), torch.zeros(2, 4, dtype=torch.double))
    assert list(graph.by_name) == ["b"]  # its number is an attribute that follows
    reasons = {reason for g in graph.locked for reason in g.locked if g.name.startswith("a")}
    assert any(
        r.startswith("view takes its size as a number at test_attention.py") for r in reasons
    )


class Encoder(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


@pytest.mark.parametrize("settings", [{}, {"norm_first": True, "activation": "gelu"}])
def test_torch_encoders_lose_hidden_units_also_on_the_fast_path(settings):
    x = torch.randn(2, 5, 6, dtype=torch.double)
    result = pruned_like_masked(randomise(Encoder(**settings), 0), (x,))
    assert result.plan.widths == {f"encoder.layers.{i}.linear1": 12 for i in range(2)}
    slow = result.model(x)  # with gradients there is no fused kernel
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), slow)
    stay = {slot.parameter for g in result.plan.graph.locked for slot in g.writers}
    assert "encoder.layers.0.self_attn.in_proj_weight" in stay  # as wide as the residual stream


class Memory(nn.Module):
    """torch.nn.MultiheadAttention with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(5, 10), nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=10, vdim=12, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, y):
        q, k, v = self.query(x), self.key(y), self.value(y)
        return self.head(self.attention(q, k, v, need_weights=False)[0])


def test_torch_attention_reads_narrower_keys_and_values():
    inputs = (torch.randn(2, 5, 6).double(), torch.randn(2, 4, 5).double())
    result = pruned_like_masked(randomise(Memory(), 0), inputs)
    assert result.plan.widths["key"] == 5 and result.plan.widths["value"] == 6
    assert (result.model.attention.kdim, result.model.attention.vdim) == (5, 6)


@pytest.mark.parametrize(
    ("projection", "view", "grouping"),
    [
        ("separate", "width", "fused"),
        ("separate", "width", "interleave"),
        ("slices", "unflatten", "fused"),
        ("slices", "width", "expand"),
    ],
)
def test_widths_of_one_number_are_told_apart_where_one_head_of_keys_is_left(
    projection, view, grouping
):
    """With a single head of keys, `view(b, t, -1, head_dim)` fits many widths by chance."""
    for width, share in ((4, 0.8), (6, 0.5)):
        model = network(
            heads=2, width=width, view=view, grouping=grouping, projection=projection, rotary=True
        )
        plan = intrafuse.plan(model, TOKENS, channels=share, importance="random")
        assert plan.apply(model)(TOKENS).shape == (2, 3)
