"""Code that holds numbers of channels, axes that channels may lie on by surprise, and `verify`."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build
from torch import nn

import intrafuse
from intrafuse.graph.rules import RULES
from intrafuse.support.errors import IntrafuseError


class Scaled(nn.Module):
    """A head that divides by a function of the number of channels."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.scale = scale
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.scale(self.body(x).relu()))


NUMBERS = {
    "root": lambda y: y / y.shape[1] ** 0.5,
    "product": lambda y: y * y[0].numel(),
    "tensor": lambda y: y / torch.sqrt(torch.tensor(y.shape[1])),
    "tensor like another": lambda y: y / y.new_tensor([1.0, y.shape[1]])[1],
    "filled": lambda y: y / torch.full((1,), float(y.shape[1])),
    "branch": lambda y: y.sigmoid() if y.shape[1] == 8 else y,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_code_that_depends_on_the_number_of_channels_is_refused(name):
    model = Scaled(NUMBERS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 6, 6)
    refused = r"number of channels.*test_verify\.py.*exclude=\['body'\]"
    if name in ("root", "product"):  # the trace itself finds the number, and locks what it follows
        refused = r"must keep their size: body \(operator \w+ at test_verify\.py"
    with pytest.raises(IntrafuseError, match=refused):
        intrafuse.prune(model, x, channels=0.5, inplace=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert intrafuse.prune(model, x, channels=0.0).model.body.out_channels == 8


def test_all_layers_that_must_be_excluded_are_named():
    class Strict(nn.Module):
        """A chain whose code insists on two of its four widths."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(SIZES))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x).relu()
                if i in (1, 3):
                    assert x.shape[1] == SIZES[i + 1], "another width"
            return x

    SIZES = (5, 12, 10, 8, 6, 3)
    model, x = Strict(), torch.randn(2, 5)
    with pytest.raises(IntrafuseError, match=r"another width.*test_verify\.py") as caught:
        intrafuse.prune(model, x, channels=0.5)
    named = re.search(r"exclude=(\[.*?\])", str(caught.value))
    assert named and sorted(ast.literal_eval(named[1])) == ["layers.1", "layers.3"]
    small = intrafuse.prune(model, x, channels=0.5, exclude=["layers.1", "layers.3"]).model
    assert [layer.out_features for layer in small.layers] == [6, 10, 4, 6, 3]


def test_channels_on_a_spatial_axis_of_a_convolution_stay():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.out = nn.Linear(5, 32), nn.Conv1d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.c(self.a(x).relu().unsqueeze(1)).amax(2))

    graph = intrafuse.trace(Mixer(), torch.zeros(4, 5))
    assert "a" not in graph.by_name and "c" in graph.by_name


def test_statistics_over_positions_lock_them():
    norms = nn.GroupNorm(3, 6), nn.BatchNorm1d(6, track_running_stats=False)
    for norm in norms:
        model = nn.Sequential(nn.Linear(5, 32), norm, nn.ReLU(), nn.Linear(32, 2))
        assert not intrafuse.trace(model, torch.zeros(4, 6, 5)).groups


def test_the_heads_of_a_mask_go_with_the_heads_of_the_queries():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias, self.out = nn.Linear(16, 48), nn.Embedding(6, 4), nn.Linear(16, 3)

        def forward(self, x):
            n, t, _ = x.shape
            parts = self.qkv(x).chunk(3, -1)
            q, k, v = (part.view(n, t, -1, 4).transpose(1, 2) for part in parts)
            steps = torch.arange(t)
            mask = self.bias((steps[None] - steps[:, None]).abs()).permute(2, 0, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

    graph = intrafuse.trace(Biased(), torch.zeros(2, 6, 16))
    layers = [set(g.layers) for g in (*graph.groups, *graph.locked)]
    assert any({"qkv", "bias"} <= found for found in layers)


@pytest.mark.parametrize("model", ["name", None, F.relu])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(IntrafuseError, match="must be a torch"):
        intrafuse.prune(model, torch.zeros(1, 2), channels=0.5)


def test_a_module_that_cannot_be_copied_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.cache = model(torch.zeros(1, 4))
    with pytest.raises(IntrafuseError, match=r"cannot be copied.*no_grad"):
        intrafuse.prune(model, torch.zeros(1, 4), channels=0.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_select_is_verified_against_a_masked_copy(name):
    model, x = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    found = intrafuse.verify(model, plan)
    assert found.relative < 1e-5 < found.effect and found.groups == len(plan.maps)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_removing_nothing_changes_nothing():
    model, x = build("chain")
    plan = intrafuse.plan(model, x, channels=0.0)
    found = intrafuse.verify(model, plan)
    assert (found.groups, found.difference, found.effect) == (0, 0.0, 0.0)


def test_inputs_that_are_all_equal_are_replaced_and_own_ones_are_taken():
    model, shape = build("chain")[0], NETWORKS["chain"].shape
    plan = intrafuse.plan(model, torch.zeros(shape), channels=0.5, method="select")
    by_zeros = intrafuse.verify(model, plan)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert intrafuse.verify(model, plan, example_inputs=noise) == by_zeros
    assert intrafuse.verify(model, plan, example_inputs=2 * noise) != by_zeros


def test_a_plan_that_was_loaded_needs_inputs(tmp_path):
    model, x = build("chain")
    intrafuse.plan(model, x, channels=0.5, method="select").save(tmp_path / "plan.safetensors")
    plan = intrafuse.Plan.load(tmp_path / "plan.safetensors")
    with pytest.raises(IntrafuseError, match="example_inputs"):
        intrafuse.verify(model, plan)
    assert intrafuse.verify(model, plan, example_inputs=x).relative < 1e-5


@pytest.mark.parametrize(
    "settings", [{"method": "folding"}, {"method": "select", "repair": "analytic"}]
)
def test_a_plan_that_merges_or_repairs_has_no_masked_reference(settings):
    model, x = build("chain")
    plan = intrafuse.plan(model, x, channels=0.5, **settings)
    with pytest.raises(IntrafuseError, match=rf"merged or repaired.*{plan.maps[0].group}"):
        intrafuse.verify(model, plan)


def test_a_rule_that_is_wrong_is_found_out_and_its_group_named(monkeypatch):
    class Centred(Scaled):
        def forward(self, x):
            y = self.body(self.stem(x).relu()).relu()
            return self.head(y - y.mean(1, keepdim=True))

    def overlooking(scope, node):
        """Forget that every channel contributes to a mean over channels."""
        return [*scope.axes(node.args[0])[:1], scope.table.atom(1), *scope.axes(node.args[0])[2:]]

    monkeypatch.setitem(RULES, "mean", overlooking)
    model, x = Centred(None), torch.randn(2, 3, 8, 8)
    model.stem = nn.Conv2d(3, 3, 1)
    plan = intrafuse.plan(model, x, channels=0.5, method="select")
    with pytest.raises(IntrafuseError, match=r"masked original.*\(at body\).*exclude"):
        intrafuse.verify(model, plan)
    plan = intrafuse.plan(model, x, channels=0.5, method="select", exclude=["body"])
    assert intrafuse.verify(model, plan).groups == 1
