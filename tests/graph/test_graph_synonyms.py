"""Two spellings of one function are one: the same groups, and each equal to a masked original."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import covering
from random_networks import randomise
from spellings import LINE, SEQUENCE, network, pruned_widths
from torch import nn

import intrafuse

PRODUCTS = {
    "t()": lambda n, h: h @ n.p.t(),
    "T": lambda n, h: h @ n.p.T,
    "mT": lambda n, h: h @ n.p.mT,
    "transpose": lambda n, h: h @ n.p.transpose(-1, -2),
    "permute": lambda n, h: h @ n.p.permute(-1, -2),
    "swapaxes": lambda n, h: h @ n.p.swapaxes(0, 1),
    "swapdims": lambda n, h: h @ n.p.swapdims(0, 1),
    "H": lambda n, h: h @ n.p.H,
    "mH": lambda n, h: h @ n.p.mH,
    "adjoint": lambda n, h: h @ n.p.adjoint(),
    "movedim": lambda n, h: h @ n.p.movedim(0, 1),
    "turned twice": lambda n, h: F.linear(h, n.p.T.T),
    "F.linear": lambda n, h: F.linear(h, n.p),
    "einsum": lambda n, h: torch.einsum("...i,oi->...o", h, n.p),
    "einsum of a turned one": lambda n, h: torch.einsum("...i,io->...o", h, n.p.T),
    "tensordot": lambda n, h: torch.tensordot(h, n.p, dims=([-1], [1])),  # type: ignore[arg-type]
    "inner": lambda n, h: torch.inner(h, n.p),
    "contiguous": lambda n, h: h @ n.p.T.contiguous(),
    "detached": lambda n, h: h @ n.p.detach().T,
    "cast": lambda n, h: h @ n.p.to(h.dtype).T,
    "cast as": lambda n, h: h @ n.p.type_as(h).T,
    "flattened": lambda n, h: h @ n.p.flatten(1).T,
    "convolution": lambda n, h: F.conv1d(h.mT, n.p.unsqueeze(-1)).mT,
    "from the left": lambda n, h: (n.p @ h.mT).mT,
    "repeated": lambda n, h: torch.bmm(h, n.p.T.expand(h.shape[0], -1, -1)),
    "copied": lambda n, h: torch.bmm(h, n.p.T.repeat(h.shape[0], 1, 1)),
    "addmm": lambda n, h: torch.addmm(h.new_zeros(1), h.flatten(0, 1), n.p.T).unflatten(0, (2, 7)),
    "mm": lambda n, h: torch.mm(h.flatten(0, 1), n.p.T).unflatten(0, (2, 7)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_turned_parameter_is_a_linear_layer(name):
    model = network(lambda n, h: F.relu(PRODUCTS[name](n, h)), (6, 8), 6)
    assert pruned_widths(model, SEQUENCE) == [6, 8]


def test_a_linear_layer_that_multiplies_by_hand_gets_no_bias_that_its_code_would_not_add():
    class Turned(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    model = randomise(nn.Sequential(nn.Linear(5, 8), Turned(8, 6, bias=False), nn.Linear(6, 2)), 0)
    assert pruned_widths(model, LINE) == [6, 8]
    assert intrafuse.trace(model, LINE).layers["1.weight"].bias is None


FUNCTIONS = {
    "as it is": lambda p: p,
    "cast": lambda p: p.float(),
    "exp": lambda p: p.exp(),
    "exp of cast": lambda p: torch.exp(p.float()),
    "cast of exp": lambda p: torch.exp(p).double(),
    "negative": lambda p: -torch.exp(p.float()),
    "times a number": lambda p: 2 * torch.exp(p.float()),
    "cast twice": lambda p: p.float().double().sigmoid(),
    "several": lambda p: torch.exp(-F.softplus(p.float())).double(),
    "repeated": lambda p: torch.exp(p.float()).expand(3, -1),
    "turned": lambda p: torch.exp(p.unsqueeze(0).double()).mT.squeeze(-1),
}
MEETINGS = {
    "times": lambda h, f: h * f,
    "plus": lambda h, f: h + f,
    "divided by": lambda h, f: h / f,
}


@pytest.mark.parametrize(("name", "meeting"), covering(FUNCTIONS, MEETINGS))
def test_channels_meet_functions_of_a_parameter_with_casts_between(name, meeting):
    model = network(lambda n, h: MEETINGS[meeting](h, FUNCTIONS[name](n.p)), (8,))
    with torch.no_grad():
        model.get_parameter("p").abs_().add_(0.5)
    assert pruned_widths(model, LINE, far=1e-6) == [8]


class Decay(nn.Module):
    """The recurrence of Mamba: a state for each channel, which decays by -exp(A_log)."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.bc = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2 * 6)
        self.log, self.skip = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = F.silu(self.into(x))
        b, c = self.bc(h).chunk(2, -1)
        rate = torch.exp(-torch.exp(self.log.float()) * F.softplus(h).unsqueeze(-1))
        state, steps = torch.zeros_like(rate[:, 0]), []
        for t in range(x.shape[1]):
            state = rate[:, t] * state + (h[:, t, :, None] * b[:, t, None, :])
            steps.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1) + h[:, t] * self.skip)
        return self.out(torch.stack(steps, 1))


def test_a_selective_state_space_loses_channels_and_state():
    model = randomise(Decay(), 0)
    assert pruned_widths(model, SEQUENCE, far=1e-6) == [6, 8]


class Joined(nn.Module):
    """Attention as in BEiT: one weight, and a bias joined of two parameters and zeros."""

    def __init__(self, join):
        super().__init__()
        self.embed, self.head, self.join = nn.Linear(5, 8), nn.Linear(8, 2), join
        self.heads = 3
        self.qkv, self.proj = nn.Linear(8, 36, bias=False), nn.Linear(12, 8)
        self.q_bias, self.v_bias = (nn.Parameter(torch.ones(12)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(12), persistent=False)

    def forward(self, x):
        h = self.embed(x)
        bias = self.join((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(h, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(h)


JOINS = {
    "cat": torch.cat,
    "concat": torch.concat,
    "parts of a cat": lambda biases: torch.cat(torch.cat(biases).chunk(3)),
    "cat of casts": lambda biases: torch.cat([bias.double() for bias in biases]),
}


@pytest.mark.parametrize("name", JOINS)
def test_a_bias_may_be_joined_of_parameters_and_zeros(name):
    model = randomise(Joined(JOINS[name]), 0)
    assert pruned_widths(model, SEQUENCE) == [3, 4, 8]
    plan = intrafuse.plan(model, SEQUENCE, channels=0.5, method="select", include=["*#width"])
    small = plan.apply(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.named_parameters()}
    assert shapes["q_bias"] == shapes["v_bias"] == tuple(small.get_buffer("k_bias").shape) == (6,)
    assert (
        shapes["qkv.weight"] == (18, 8) and vars(small.get_submodule("qkv"))["out_features"] == 18
    )


def test_a_bias_that_is_joined_of_parts_and_sums_stays():
    model = randomise(Joined(lambda biases: torch.cat([2 * bias for bias in biases])), 0)
    locked = [r for group in intrafuse.trace(model, SEQUENCE).locked for r in group.locked]
    assert any("its bias is computed, not a parameter" in reason for reason in locked)


class Patches(nn.Module):
    """Numbers in attributes, of which some have the size of the width by chance."""

    def __init__(self, names):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 2)
        for name in names:
            setattr(self, name, 8)

    def forward(self, x):
        torch._assert(x.shape[2] == self.size, "another size than the network was made for")
        h = self.conv(x).reshape(x.shape[0], self.width, x.shape[2] * x.shape[3] // 4)
        return self.head(F.relu(h).mT)


@pytest.mark.parametrize("names", [("size", "width"), ("width", "size"), ("a", "size", "width")])
def test_a_number_that_is_equal_by_chance_is_told_from_the_one_that_is_meant(names):
    model = randomise(Patches(names), 0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert pruned_widths(model, x) == [8]
    small = intrafuse.prune(model, x, channels=0.5, method="select").model
    assert (small.size, small.width) == (8, 4)


class Counted(nn.Module):
    """Attention whose heads, width, length and batch may be one number."""

    count: int
    each: int

    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, 4)
        self.embed, self.head = nn.Linear(5, 16), nn.Linear(16, 2)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        torch._assert(t == self.length, "another length than the network was made for")
        h = self.embed(x)
        q, k, v = (
            f(h).view(b, t, self.count, self.each).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(h + self.o(y.reshape(b, t, self.count * self.each)))


@pytest.mark.parametrize(
    "names", [("length", "count", "each"), ("each", "length", "count"), ("count", "each", "length")]
)
def test_heads_width_length_and_batch_of_one_size_are_told_apart(names):
    model = randomise(Counted(names), 0)
    x = torch.randn(4, 4, 5, dtype=torch.double)
    assert pruned_widths(model, x) == [4, 4, 16]
