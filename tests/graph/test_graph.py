"""The channel graph: what each operator couples, and what is locked with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import intrafuse
from intrafuse.graph import trace


class Apply(nn.Module):
    """conv (3 -> 8), then an operator under test, then whatever reads it."""

    def __init__(self, operator, reader: nn.Module | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.operator = operator
        self.reader = reader if reader is not None else nn.Conv2d(8, 4, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.reader(self.operator(self, self.conv(x)))


X = torch.zeros(2, 3, 8, 8)


def widths(model: nn.Module, x=X) -> dict[str, int]:
    return {group.name: group.size for group in trace(model, x).groups}


PASSES = {
    "relu": lambda m, h: F.relu(h),
    "in-place": lambda m, h: F.relu_(h) + 1,
    "scalar": lambda m, h: 2 * h - 1,
    "power": lambda m, h: h**2,
    "clamp": lambda m, h: h.clamp(0, 6),
    "dropout": lambda m, h: F.dropout(h, 0.5, m.training),
    "where": lambda m, h: torch.where(h > 0, h, 0.1 * h),
    "max pool": lambda m, h: F.max_pool2d(h, 2),
    "avg pool": lambda m, h: F.avg_pool2d(h, 2),
    "adaptive max": lambda m, h: F.adaptive_max_pool2d(h, 2),
    "lp pool": lambda m, h: F.adaptive_avg_pool2d(h, 1),
    "upsample": lambda m, h: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "spatial pad": lambda m, h: F.pad(h, (1, 1, 2, 2)),
    "reflect pad": lambda m, h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "spatial slice": lambda m, h: h[:, :, ::2, 1:],
    "gate": lambda m, h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "permute there and back": lambda m, h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "flatten and back": lambda m, h: h.flatten(2).unflatten(2, (8, 8)),
    "spatial view": lambda m, h: h.view(h.size(0), -1, 64).view(2, -1, 8, 8),
    "chunk and cat": lambda m, h: torch.cat(h.chunk(2, 1)[::-1], 1),
    "residual": lambda m, h: h + F.relu(h),
    "expand_as": lambda m, h: h + h.mean((2, 3), keepdim=True).expand_as(h),
}


@pytest.mark.parametrize("name", PASSES)
def test_channels_pass_through(name):
    model = Apply(PASSES[name])
    group = trace(model, X).by_name["conv"]
    assert group.size == (4 if "chunk" in name else 8)
    assert [slot.parameter for slot in group.readers] == ["reader.weight"]


LOCKS = {
    "softmax over channels": (lambda m, h: h.softmax(1), "softmax is taken over it"),
    "mean over channels": (lambda m, h: h + h.mean(1, keepdim=True), "mean is taken over it"),
    "cumsum": (lambda m, h: h.cumsum(1), "the order along it matters to cumsum"),
    "flip": (lambda m, h: h.flip(1), "the order along it matters to flip"),
    "literal split": (lambda m, h: torch.cat(h.split([3, 5], 1), 1), "takes its size as a number"),
    "literal slice": (
        lambda m, h: torch.cat([h[:, 3:], h[:, :3]], 1),
        "takes its size as a number",
    ),
    "literal view": (lambda m, h: h.view(2, 8, 64).view(2, 8, 8, 8), "takes its size as a number"),
    "literal slice inside": (lambda m, h: h + h[:, 3:4], "takes its size as a number"),
    "literal slice from the end": (lambda m, h: h + h[:, -5:-4], "takes its size as a number"),
    "literal narrow": (lambda m, h: h + h.narrow(1, 3, 1), "takes its size as a number"),
    "channel shuffle": (
        lambda m, h: h.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8),
        "takes its size as a number",
    ),
    "one channel by number": (lambda m, h: h * h.select(1, 0).unsqueeze(1), "selected by number"),
    "strided channels": (lambda m, h: torch.cat([h[:, ::3], h[:, 3:]], 1), "as a number"),
    "channels meet positions": (lambda m, h: h + h.transpose(1, 3), "spatial"),
}


@pytest.mark.parametrize("name", LOCKS)
def test_locked_with_the_reason(name):
    operator, reason = LOCKS[name]
    graph = trace(Apply(operator), X)
    assert "conv" not in graph.by_name
    locked = [g for g in graph.locked if "conv" in g.layers]
    assert locked and all(any(reason in r for r in g.locked) for g in locked)


def test_the_model_output_is_locked_and_inputs_are_no_group():
    graph = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4))
    assert [(g.name, g.size) for g in graph.groups] == [("0", 8)]
    assert [(g.name, g.locked) for g in graph.locked] == [("1", ("model output",))]


def test_carriers_lie_between_writer_and_reader():
    def operator(m, h):
        return m.prelu(m.depth(m.norm(h))) * m.scale + m.shift

    model = Apply(
        operator, norm=nn.BatchNorm2d(8), prelu=nn.PReLU(8), depth=nn.Conv2d(8, 8, 3, groups=8)
    )
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    model.shift = nn.Parameter(torch.ones(1, 8, 1, 1))
    group = trace(model, X).by_name["conv"]
    found = {(slot.parameter, slot.axis): slot.kind for slot in group.carriers}
    assert found == {
        ("norm.weight", 0): "scale", ("norm.bias", 0): "shift",
        ("norm.running_mean", 0): "mean", ("norm.running_var", 0): "variance",
        ("depth.weight", 0): "scale", ("depth.bias", 0): "shift",
        ("prelu.weight", 0): "scale", ("scale", 0): "scale", ("shift", 1): "shift",
    }  # fmt: skip


def test_a_flattened_map_is_one_channel_with_a_block():
    model = Apply(lambda m, h: F.max_pool2d(h, 2).flatten(1), nn.Linear(8 * 16, 5))
    (slot,) = trace(model, X).by_name["conv"].readers
    assert (slot.parameter, slot.axis) == ("reader.weight", 1)
    assert [(b.offset, b.inner, b.outer) for b in slot.blocks] == [(0, 16, ())]


def test_concatenation_puts_channels_behind_each_other():
    model = Apply(
        lambda m, h: torch.cat([h, m.other(h), h], 1), nn.Conv2d(21, 4, 1), other=nn.Conv2d(8, 5, 1)
    )
    graph = trace(model, X)
    assert [b.offset for b in graph.by_name["conv"].readers[1].blocks] == [0, 13]
    assert [b.offset for b in graph.by_name["other"].readers[0].blocks] == [8]


def test_grouped_convolution_keeps_the_inside_of_its_groups():
    model = Apply(lambda m, h: m.mid(h), nn.Conv2d(12, 4, 1), mid=nn.Conv2d(8, 12, 3, groups=4))
    graph = trace(model, X)
    assert widths(model) == {"conv": 4}
    group = graph.by_name["conv"]
    inner = {slot.parameter: slot.blocks[0].inner for slot in group.slots}
    assert inner["conv.weight"] == 2 and inner["mid.weight"] == 3 and inner["reader.weight"] == 3


def test_shared_parameters_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.b(F.relu(self.a(x))))

    graph = trace(Tied(), torch.zeros(1, 6))
    assert graph.aliases == {"b.weight": "a.weight"}
    assert (
        not graph.groups
    )  # what a writes, b reads with the same matrix, whose input is the model's


def test_option_a_shortcut_prunes_the_stream_and_keeps_the_padding():
    from intrafuse.catalog.zoo import resolve_model

    resolved = resolve_model("resnet20")
    graph = trace(resolved.model, resolved.example_inputs)
    stream = graph.by_name["conv1"]
    assert stream.size == 16
    where = {slot.parameter: slot.blocks[0].offset for slot in stream.slots}
    assert where["layer2.1.conv1.weight"] == 8 and where["layer3.1.conv1.weight"] == 24
    padding = [g for g in graph.locked if any("padding" in reason for reason in g.locked)]
    assert sorted(g.size for g in padding) == [8, 8, 16, 16]


def test_multiply_accumulates_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Flatten(),
        nn.Linear(4 * 256, 10),
    )
    graph = trace(model, X)
    by_hand = 64 * (3 * 8 * 9 + 8 * 9 + 8 * 4 * 4) + 4 * 256 * 10
    assert graph.macs(graph.sizes) == by_hand


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "keywords"])
def test_inputs_of_any_form(inputs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.out = nn.Embedding(10, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, ids=None):
            h = self.a(x)
            return self.out(h if ids is None else h + self.embed(ids)), {"hidden": x}

    x, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    given = {"tensor": x, "tuple": (x, ids), "keywords": {"x": x, "ids": ids}}[inputs]
    graph = trace(Two(), given)
    writers = {slot.parameter for group in graph.groups for slot in group.writers}
    assert ("embed.weight" in writers) == (inputs != "tensor")


def test_the_model_is_left_alone():
    model = Apply(PASSES["dropout"], norm=nn.BatchNorm2d(8))
    model.train()
    model.reader.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, X)
    assert model.training and model.norm.training and not model.reader.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_an_untraceable_model_names_operator_and_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(intrafuse.IntrafuseError, match=r"test_graph\.py:\d+.*Remedy"):
        trace(Branches(), torch.zeros(1, 2))
