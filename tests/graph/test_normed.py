"""Channels that a norm takes its statistics over: known answers, what stays, and `verify`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import intrafuse
from intrafuse import IntrafuseError

METHODS = ("select", "intra-fusion", "folding", "moment")


class Normed(nn.Module):
    """A layer, a norm over its four outputs, and a layer that reads them."""

    def __init__(self, norm: str, width: int = 4) -> None:
        super().__init__()
        self.norm, self.write = norm, nn.Linear(3, width, bias=False)
        self.weight, self.bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.one, self.read = nn.Parameter(torch.ones(1)), nn.Linear(width, 2, bias=False)

    def forward(self, x):
        x = self.write(x)
        over = x.shape[-1:]

        def square():
            return x.pow(2).mean(-1, keepdim=True)

        return self.read({
            "layer": lambda: F.layer_norm(x, over, self.weight, self.bias),
            "rms": lambda: F.rms_norm(x, over, self.weight, 1e-3),
            "by hand": lambda: self.weight * (x * torch.rsqrt(square() + 1e-3)).to(x.dtype),
            "divided": lambda: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * self.weight,
            "from one": lambda: x * torch.rsqrt(square() + 1e-3) * (1 + self.weight),
            "of a sigmoid": lambda: F.rms_norm(torch.sigmoid(x), over, self.weight),
            "no weight": lambda: F.layer_norm(x, over),
            "no weight by hand": lambda: x * torch.rsqrt(square() + 1e-3),
            "one weight": lambda: x * torch.rsqrt(square() + 1e-3) * self.one,
            "another tensor": lambda: (x + 1) * torch.rsqrt(square() + 1e-3) * self.weight,
            "learnt eps": lambda: x * torch.rsqrt(square() + self.one.exp()) * self.weight,
            "used twice": lambda: F.layer_norm(x, over, self.weight) * self.weight,
            "a number": lambda: F.layer_norm(x, (4,), self.weight),
        }[self.norm]())  # fmt: skip


def planned(model, x, **options):
    return intrafuse.plan(
        model, x, channels=0.5, include=["*#normed"], **{"method": "select", **options}
    )


class Norm(nn.Module):
    """A norm of some kind over the last dimension."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(width))

    def forward(self, x):
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, eps=0.0)
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, 0.0)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * (1 + self.weight)


class Stream(nn.Module):
    """Random blocks that read and write one stream, with norms before or behind them."""

    def __init__(self, draw) -> None:
        super().__init__()
        kinds = st.sampled_from(["layer", "rms", "from one"])
        width = draw(st.integers(4, 9))
        self.before = draw(st.lists(st.booleans(), min_size=1, max_size=3))
        self.gated = [draw(st.booleans()) for _ in self.before]
        self.norms = nn.ModuleList(Norm(draw(kinds), width) for _ in self.before)
        self.ups = nn.ModuleList(nn.Linear(width, 6 * (1 + gate)) for gate in self.gated)
        self.downs = nn.ModuleList(nn.Linear(6, width) for _ in self.before)
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        blocks = zip(self.before, self.gated, self.norms, self.ups, self.downs, strict=True)
        for before, gated, norm, up, down in blocks:
            h = up(norm(x) if before else x)
            x = x + down(F.glu(h) if gated else F.silu(h))
            x = x if before else norm(x)
        return self.head(x)


@settings(max_examples=8)
@given(st.data())
def test_random_streams_equal_their_masked_references(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model, x = Stream(data.draw).double(), torch.randn(4, 3).double()
    plan = intrafuse.plan(model, x, channels=0.4, method="select", include=["*"])
    assert sum(name.endswith("#normed") for name in plan.widths) == 1
    assert len(plan.widths) == 1 + len(model.before)
    found = intrafuse.verify(model, plan, tolerance=1e-9)
    assert found.effect > 1e-6


def test_rms_norm_by_numbers():
    model = Normed("rms")
    model.write.weight.data = torch.diag(torch.tensor([3.0, 4.0, 0.1, 0.1]))[:, :3].clone()
    model.weight.data = torch.tensor([2.0, 3.0, 5.0, 7.0])
    model.read.weight.data = torch.ones(2, 4)
    small = planned(model, torch.ones(1, 3)).apply(model)
    # (3, 4) divided by sqrt(25 / 2) and multiplied by (2, 3) sqrt(4 / 2): by sqrt(25 / 4) in all
    torch.testing.assert_close(small.weight.data, 2**0.5 * torch.tensor([2.0, 3.0]))
    wanted = torch.full((1, 2), (3 * 2 + 4 * 3) / 2.5)
    torch.testing.assert_close(small(torch.ones(1, 3)), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms", "by hand", "divided", "from one", "of a sigmoid"])
def test_selected_channels_are_divided_as_if_the_others_were_zero(norm):
    model, x = Normed(norm), torch.randn(5, 3)
    found = intrafuse.verify(model, planned(model, x, importance="random"))
    assert found.relative < 1e-5 < found.effect


@pytest.mark.parametrize("norm", ["layer", "rms", "by hand", "from one"])
def test_verify_fails_where_the_weight_does_not_make_up_for_the_number(norm):
    model, x = Normed(norm), torch.randn(5, 3)
    plan = planned(model, x)
    forgetful = replace(plan, graph=replace(plan.graph, rescales=()))
    with pytest.raises(IntrafuseError, match="must equal those of the masked original"):
        intrafuse.verify(model, forgetful)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        ("no weight", "has no weight"),
        ("no weight by hand", "mean is taken over it"),
        ("one weight", "mean is taken over it"),
        ("another tensor", "mean is taken over it"),
        ("learnt eps", "mean is taken over it"),
        ("used twice", "weight is used by more than a norm"),
        ("a number", "layer_norm takes its size as a number"),
    ],
)
def test_what_cannot_be_made_up_for_stays(norm, why):
    graph = intrafuse.trace(Normed(norm), torch.randn(5, 3), include=["*"])
    (group,) = (g for g in graph.locked if g.layers == ("write",))
    assert any(why in reason for reason in group.locked)


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_is_left_whole_unless_it_is_named_and_then_selected(method):
    model, x = Normed("layer"), torch.randn(5, 3)
    (held,) = (g for g in intrafuse.trace(model, x).locked if g.normed)
    assert "include=['write#normed']" in held.locked[0]
    (step,) = planned(model, x, method=method, repair="analytic").maps
    assert step.keep is not None and not step.readers and not step.gain and not step.shift


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("write", "it is locked unless `include` names it"),
        ("read#normed", "matches no channel group"),
    ],
)
def test_another_name_than_its_group_has_does_not_free_a_norm(pattern, why):
    model, x = Normed("layer"), torch.randn(5, 3)
    with pytest.raises(IntrafuseError, match=why) as refused:
        intrafuse.plan(model, x, channels=0.5, method="select", include=[pattern])
    assert refused.value.remedy == "include=['write#normed'] (--include)"


def test_the_name_of_norms_is_refused_where_there_are_none():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(IntrafuseError, match="this network has no group that such a name unlocks"):
        planned(model, torch.randn(5, 3))


def test_nothing_but_zeros_gives_no_nan():
    model = Normed("rms")
    small = planned(model, torch.randn(5, 3)).apply(model)
    assert torch.equal(small(torch.zeros(1, 3)), torch.zeros(1, 2))


def test_a_saved_plan_makes_the_same_network(tmp_path):
    model, x = Normed("from one"), torch.randn(5, 3)
    plan = planned(model, x)
    plan.save(tmp_path / "plan.safetensors")
    loaded = intrafuse.Plan.load(tmp_path / "plan.safetensors")
    assert torch.equal(loaded.apply(model)(x), plan.apply(model)(x))
    assert intrafuse.verify(model, loaded, example_inputs=x).relative < 1e-5


def test_sizes_of_modules_follow_and_load_takes_them(tmp_path):
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    plan = planned(model, x)
    small = plan.apply(model)
    assert small[1].normalized_shape == (4,)
    intrafuse.save(tmp_path / "small", small, plan=plan)
    assert torch.equal(intrafuse.load(tmp_path / "small", model=model)(x), small(x))


@pytest.mark.parametrize("pattern", ["*#heads", "*#width"])
def test_packed_attention_loses_heads_or_width_with_that_of_its_input(pattern):
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 12), layer, nn.Linear(12, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.double)
    plan = intrafuse.plan(model, x, channels=0.5, method="select", include=[pattern])
    assert intrafuse.verify(model, plan).relative < 1e-12
    attention = plan.apply(model)[1].self_attn
    sizes = {"*#heads": (6, 2, 3), "*#width": (4, 4, 1)}[pattern]
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == sizes
    assert intrafuse.trace(model, x).by_name.keys() == {"1.linear1"}  # unless it is named
