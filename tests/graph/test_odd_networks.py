"""Networks as users write them: each is pruned by `select` and held against a masked original."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from networks import Net
from torch import nn

import intrafuse
from intrafuse import IntrafuseError

Pair = namedtuple("Pair", "first second")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Attend(nn.Module):
    """Attention whose sizes come from where `sizes` says."""

    def __init__(self, sizes, **held):
        super().__init__()
        self.into, self.qkv, self.out = nn.Linear(8, 12), nn.Linear(12, 36), nn.Linear(12, 4)
        self.sizes = sizes
        vars(self).update(held)

    def forward(self, x):
        x = self.into(x)
        b, n, _ = x.shape
        heads, width, parts = self.sizes(self, x)
        parts = self.qkv(x).split(parts, -1)
        q, k, v = (t.view(b, n, heads, width).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(b, n, -1))


class Standardised(nn.Conv1d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        w = w / w.std((1, 2), keepdim=True)
        return F.conv1d(x, w, self.bias, groups=self.groups)


def lists(net, x):
    return net.held["heads"], -1, net.parts


def configuration(net, x):
    return net.config.heads, net.config.width, net.qkv.out_features // 3


def divided(net, x):
    return net.heads, x.shape[-1] // net.heads, x.shape[-1]


def complex_rotation(net, x):
    q, k, v = (part(x).view(2, 5, net.heads, net.width) for part in (net.q, net.k, net.v))
    pairs = (torch.view_as_complex(t.reshape(2, 5, net.heads, -1, 2)) for t in (q, k))
    turn = torch.polar(torch.ones(5, 3), torch.outer(torch.arange(5.0), net.speed))
    q, k = (torch.view_as_real(t * turn[:, None]).flatten(3) for t in pairs)
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return net.out(y.transpose(1, 2).reshape(2, 5, -1))


def recurrent_decay(net, x):
    x, state, rate = net.a(x), 0.0, torch.exp(-net.rate.exp())
    for t in range(x.shape[1]):
        state = state * rate + x[:, t]
    return net.b(state)


def messages(net, x, edges):
    h = net.a(x)
    summed = torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]])
    index = edges[1][:, None].expand(-1, h.shape[1])
    return net.b(F.relu(torch.zeros_like(h).scatter_add(0, index, summed[edges[0]])))


def every_other(net, x):
    h = net.a(x)
    return net.b(h[..., ::2] * torch.sigmoid(h[..., 1::2]))


def half_precision_region(net, x):
    with torch.autocast("cpu", enabled=False):
        h = net.a(x)
    return net.b(F.relu(h))


def pool_by_vector(net, x):
    h = torch.tanh(net.a(x))
    return net.b(torch.sum(h * torch.softmax(h @ net.v, 1).unsqueeze(-1), 1))


def in_frequencies(net, x):
    h = torch.fft.rfft(net.a(x), dim=1) * net.filter
    return net.b(torch.fft.irfft(h, n=x.shape[1], dim=1))


def attend_packed(net, x):
    h = net.a(x)
    return net.b(h + net.m(h, h, h, need_weights=False)[0])


def from_learned_state(net, x):
    return net.b(net.g(x, net.state.expand(-1, x.shape[0], -1).contiguous())[0])


def layers(a: int, b: int) -> dict[str, nn.Module]:
    return {"a": nn.Linear(8, a), "b": nn.Linear(b, 4)}


def parameter(*shape: int, dtype=None) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
NETWORKS = {
    "sizes in a list and a dictionary": (
        lambda: Attend(lists, parts=[12, 12, 12], held={"heads": 3}),
        (noise(2, 5, 8),),
        {"into": 12, "qkv#heads": 3, "qkv#width": 4, "qkv#width#2": 4},
    ),
    "sizes in a configuration": (
        lambda: Attend(configuration, config=SimpleNamespace(heads=3, width=4)),
        (noise(2, 5, 8),),
        {"into": 12, "qkv#heads": 3, "qkv#width": 4},
    ),
    "sizes divided from another axis": (
        lambda: Attend(divided, heads=3),
        (noise(2, 5, 8),),
        {"into#heads": 3, "into#width": 4},
    ),
    "complex rotation": (
        lambda: Net(
            complex_rotation,
            **{name: nn.Linear(8, 24) for name in "qkv"},
            out=nn.Linear(24, 4),
            speed=torch.rand(3),
            heads=4,
            width=6,
        ),
        (noise(2, 5, 8),),
        {"q#heads": 4},
    ),
    "packed attention that no norm follows": (
        lambda: Net(
            attend_packed, m=nn.MultiheadAttention(12, 3, batch_first=True), **layers(12, 12)
        ),
        (noise(2, 5, 8),),
        {"a#heads": 3, "a#width": 4},
    ),
    "dots in an equation": (
        lambda: Net(
            lambda net, x: net.b(torch.einsum("...i,ij->...j", net.a(x).relu(), net.w).relu()),
            w=parameter(6, 10),
            **layers(6, 10),
        ),
        (noise(2, 5, 8),),
        {"a": 6, "": 10},
    ),
    "product with a vector": (
        lambda: Net(pool_by_vector, v=parameter(6), **layers(6, 6)),
        (noise(2, 5, 8),),
        {"a": 6},
    ),
    "every other position": (lambda: Net(every_other, **layers(12, 6)), (noise(2, 8),), {"a": 6}),
    "messages on a graph": (
        lambda: Net(messages, **layers(6, 6)),
        (noise(5, 8), EDGES),
        {"a": 6},
    ),
    "Fourier transform": (
        lambda: Net(in_frequencies, filter=parameter(3, 6, dtype=torch.cfloat), **layers(6, 6)),
        (noise(2, 5, 8),),
        {"a": 6},
    ),
    "bag of embeddings": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 6), nn.Linear(6, 4)),
        (torch.tensor([[1, 2, 3], [3, 4, 5]]),),
        {"0": 6},
    ),
    "initial state that is learned": (
        lambda: Net(
            from_learned_state,
            g=nn.GRU(8, 6, 2, batch_first=True),
            state=parameter(2, 1, 6),
            b=nn.Linear(6, 4),
        ),
        (noise(2, 5, 8),),
        {"g": 6},
    ),
    "standardised weights in groups": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 1), Standardised(6, 6, 3, groups=6), nn.ReLU(), nn.Conv1d(6, 2, 1)
        ),
        (noise(2, 3, 8),),
        {"0": 6},
    ),
    "function of a parameter": (
        lambda: Net(recurrent_decay, rate=parameter(6), **layers(6, 6)),
        (noise(2, 5, 8),),
        {"a": 6},
    ),
    "region of another precision": (
        lambda: Net(half_precision_region, **layers(6, 6)),
        (noise(2, 8),),
        {"a": 6},
    ),
    "named tuple as input": (
        lambda: Net(
            lambda net, pair: net.b(F.relu(net.a(pair.first + pair.second))), **layers(6, 6)
        ),
        (Pair(noise(2, 8), torch.zeros(2, 8)),),
        {"a": 6},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_networks_equal_their_masked_original(name):
    build, inputs, groups = NETWORKS[name]
    torch.manual_seed(0)
    net = build()
    pruned = intrafuse.prune(net, inputs, channels=0.5, method="select", importance="random")
    assert {group.name: group.size for group in pruned.plan.graph.groups} == groups
    found = intrafuse.verify(net, pruned.plan)
    assert found.relative < 1e-5 < found.effect
    pruned.model.train()(*inputs).sum().backward()


def test_sizes_in_objects_are_saved_and_loaded(tmp_path):
    build, inputs, _ = NETWORKS["sizes in a configuration"]
    small = intrafuse.prune(build(), inputs, channels=0.5)
    again = intrafuse.load(intrafuse.save(tmp_path / "net", small), build())
    assert (again.config.heads, again.config.width) == (1, 2)
    torch.testing.assert_close(again(*inputs), small.model.eval()(*inputs), rtol=0, atol=0)


def test_features_that_are_never_zero_keep_the_width_that_is_summed_over():
    def forward(net, x):
        q, k = (F.elu(part(x)) + 1 for part in (net.q, net.k))
        return net.b(torch.einsum("nd,de->ne", q, torch.einsum("nd,ne->de", k, net.a(x))))

    net = Net(forward, q=nn.Linear(8, 6), k=nn.Linear(8, 6), **layers(6, 6))
    graph = intrafuse.trace(net, noise(5, 8))
    assert list(graph.by_name) == ["a"]
    (locked,) = [group for group in graph.locked if group.name.startswith("q")]
    assert "that no weights can make zero" in locked.locked[0]


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.out(self.lstm(packed)[1][0][-1])


class Unpacked(Packed):
    def forward(self, x, lengths):
        if torch.compiler.is_exporting():
            return self.out(self.lstm(x)[1][0][-1])
        return super().forward(x, lengths)


def test_packed_sequences_are_refused_with_a_remedy_that_holds():
    inputs = (noise(2, 5, 8), torch.tensor([5, 3]))
    with pytest.raises(IntrafuseError, match=r"torch\.compiler\.is_exporting"):
        intrafuse.trace(Packed(), inputs)
    net = Unpacked()
    plan = intrafuse.plan(net, inputs, channels=0.5, method="select")
    assert plan.widths == {"lstm": 3}
    assert intrafuse.verify(net, plan).relative < 1e-5


def test_a_script_is_refused_with_its_remedy():
    with pytest.raises(IntrafuseError, match=r"before torch\.jit made it a script"):
        intrafuse.trace(torch.jit.script(nn.Linear(2, 2)), noise(1, 2))


def view():
    def forward(net, x):
        return net.b(F.relu(net.a(x)).view(-1, 6))

    return forward


def reshape():
    def forward(net, x):
        return net.b(torch.reshape(F.relu(net.a(x)), (x.shape[0], 6)))

    return forward


def ones():
    def forward(net, x):
        return net.b(net.a(x) + torch.ones(x.shape[0], 6))

    return forward


def slice_():
    def forward(net, x):
        return net.b(F.pad(net.a(x)[:, :4], (0, 2)))

    return forward


@pytest.mark.parametrize("form", [view, reshape, ones, slice_])
def test_a_refusal_names_the_line_of_a_literal_size(form):
    forward = form()
    where = rf"{__name__}\.py:{forward.__code__.co_firstlineno + 1}\)"
    with pytest.raises(IntrafuseError, match=rf"a \(\w+ takes its size as a number at {where}"):
        intrafuse.prune(Net(forward, **layers(6, 6)), noise(2, 8), channels=0.5)


def test_a_refusal_names_a_tensor_that_is_no_buffer():
    net = Net(lambda net, x: net.b(net.a(x) + net.held[0]), held=[torch.ones(6)], **layers(6, 6))
    with pytest.raises(
        IntrafuseError, match=r"a \(a tensor of the model's code that is not a buffer"
    ):
        intrafuse.prune(net, noise(2, 8), channels=0.5)


def test_an_assertion_about_a_size_names_its_line_and_what_to_exclude():
    def forward(net, x):
        h = F.relu(net.a(x))
        assert h.shape[1] == 6, "six features"
        return net.b(h)

    line = forward.__code__.co_firstlineno + 2
    with pytest.raises(IntrafuseError, match=rf"six features.*py:{line}:.*exclude=\['a'\]"):
        intrafuse.prune(Net(forward, **layers(6, 6)), noise(2, 8), channels=0.5)
