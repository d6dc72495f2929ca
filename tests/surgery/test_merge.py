"""Merge maps with known answers on every network: permutations, copies, gains and shifts."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, build, copy_channels, outputs
from random_networks import RandomNetwork, randomise
from torch import nn

import intrafuse
from intrafuse import MergeMap, Plan
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

LAYERS = {
    "linear": (nn.Linear(4, 6), ()),
    "conv": (nn.Conv2d(4, 6, 3), (5, 5)),
    "no bias": (nn.Conv1d(4, 6, 3, bias=False), (5,)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (5, 5)),
}


@cache
def traced(name):
    model, x = build(name)
    return model, x, intrafuse.trace(model, x)


def weights_of(model, graph, fold):
    weights = Weights.of(graph, model)
    if fold:
        fold_norms(weights)
    return weights


def permutation(group):
    generator = torch.Generator().manual_seed(group.size)
    return torch.eye(group.size)[torch.randperm(group.size, generator=generator)]


@pytest.mark.parametrize("fold", [False, True], ids=["norms", "folded"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_permutation_leaves_outputs_unchanged(name, fold):
    model, x, graph = traced(name)
    weights = weights_of(model, graph, fold)
    for group in graph.groups:
        weights.merge(MergeMap.linear(group.name, permutation(group)).check())
    other = install(model, weights)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))
    torch.testing.assert_close(outputs(other, x), outputs(model, x), atol=1e-5, rtol=1e-5)


def pairs(group):
    """Merge each even channel with its copy: P averages, Q adds what readers take from both."""
    member = torch.zeros(-(-group.size // 2), group.size)
    member[torch.arange(group.size) // 2, torch.arange(group.size)] = 1
    return MergeMap.linear(group.name, member / member.sum(1, keepdim=True), member.T)


@pytest.mark.parametrize("fold", [False, True], ids=["norms", "folded"])
@pytest.mark.parametrize("name", NETWORKS)
def test_duplicated_channels_merge_without_loss(name, fold):
    """Every structure that carries channels: norms, depthwise, PReLU, flatten, groups, sums."""
    graph = traced(name)[2]
    model, x = build(name)
    copy_channels(model, graph)
    weights = weights_of(model, graph, fold)
    for group in reversed(graph.groups):
        weights.merge(pairs(group).check())
    small = install(model, weights)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(outputs(small, x), outputs(model, x), atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.data(), st.booleans(), st.integers(0, 1000))
def test_random_networks_obey_the_same_laws(data, fold, seed):
    model = randomise(RandomNetwork(data.draw), seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    graph = intrafuse.trace(model, x)
    weights = weights_of(model, graph, fold)
    for group in graph.groups:
        weights.merge(MergeMap.linear(group.name, permutation(group)))
    torch.testing.assert_close(outputs(install(model, weights), x), outputs(model, x))
    copy_channels(model, graph)
    weights = weights_of(model, graph, fold)
    for group in reversed(graph.groups):
        weights.merge(pairs(group))
    small = install(model, weights)
    torch.testing.assert_close(outputs(small, x), outputs(model, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_selecting_is_the_same_as_multiplying_by_rows_of_the_identity(name):
    model, _, graph = traced(name)
    chosen, multiplied = weights_of(model, graph, False), weights_of(model, graph, False)
    for group in graph.groups:
        step = MergeMap.select(group.name, group.size, torch.arange(0, group.size, 2))
        chosen.merge(step.check())
        multiplied.merge(replace(step, keep=None))
    for key, tensor in chosen.state.items():
        torch.testing.assert_close(tensor, multiplied.state[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_can_be_merged_in_any_order(name):
    model, _, graph = traced(name)
    there, back = weights_of(model, graph, True), weights_of(model, graph, True)
    for group in graph.groups:
        there.merge(pairs(group))
    for group in reversed(graph.groups):
        back.merge(pairs(group))
    for key, tensor in there.state.items():
        torch.testing.assert_close(tensor, back.state[key], atol=1e-5, rtol=1e-5)


# --- gains and shifts


@pytest.mark.parametrize("kind", LAYERS)
def test_gain_and_shift_act_on_the_outputs_of_a_reader(kind):
    torch.manual_seed(0)
    layer, size = LAYERS[kind]
    first = nn.Linear(3, 4) if not size else (nn.Conv2d, nn.Conv1d)[len(size) == 1](3, 4, 1)
    model, x = nn.Sequential(first, layer).eval(), torch.randn(2, 3, *size)
    graph = intrafuse.trace(model, x)
    weights = Weights.of(graph, model)
    gain, shift = torch.rand(6) + 0.5, torch.randn(6)
    step = MergeMap.select("0", 4, torch.arange(4))
    weights.merge(replace(step, gain={"1.weight": gain}, shift={"1.weight": shift}))
    line = [6] + [1] * len(size)
    expected = outputs(model, x) * gain.view(line) + shift.view(line)
    torch.testing.assert_close(outputs(install(model, weights), x), expected)


@pytest.mark.parametrize("fold", [False, True], ids=["norms", "folded"])
def test_a_positive_gain_passes_through_relu(fold):
    """Scaling what writers give and dividing what readers take changes nothing."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 6, 6)
    graph = intrafuse.trace(model, x)
    weights = weights_of(model, graph, fold)
    gain = torch.rand(8) + 0.5
    step = MergeMap.linear("0", torch.eye(8))
    weights.merge(
        replace(step, writer_gain={"0.weight": gain}, readers={"4.weight": torch.diag(1 / gain)})
    )
    other = install(model, weights)
    torch.testing.assert_close(other[0].weight, model[0].weight * gain.view(-1, 1, 1, 1))
    torch.testing.assert_close(outputs(other, x), outputs(model, x), atol=1e-5, rtol=1e-5)


def test_a_writer_of_several_groups_is_scaled_only_where_the_group_lies():
    """The last convolution adds to 2 padded channels, the 8 of the stem, and 2 padded ones."""
    model, _, graph = traced("option-a")
    weights = weights_of(model, graph, False)
    gain, shift = torch.rand(8) + 0.5, torch.randn(8)
    step = MergeMap.linear("stem", torch.eye(8))
    weights.merge(
        replace(step, writer_gain={"conv2.weight": gain}, writer_shift={"conv2.weight": shift})
    )
    for key, tensor in weights.state.items():
        if key == "conv2.weight":
            old = model.conv2.weight.clone()
            old[2:10] *= gain.view(-1, 1, 1, 1)
        elif key == "conv2.bias":  # the convolution had none
            old = torch.cat([torch.zeros(2), shift, torch.zeros(2)])
        else:
            old = model.state_dict()[key]
        torch.testing.assert_close(tensor, old)


def test_one_reader_may_have_a_decoder_of_its_own():
    model, x, graph = traced("residual")
    weights = weights_of(model, graph, True)
    step = MergeMap.linear("stem", torch.eye(8))
    weights.merge(replace(step, readers={"short.0.weight": torch.zeros(8, 8)}))
    other = install(model, weights)
    assert not other.short[0].weight.any()
    torch.testing.assert_close(other.conv1(torch.ones(1, 8, 4, 4)).shape, torch.Size([1, 10, 2, 2]))
    folded = intrafuse.fold_batchnorm(model, x)
    torch.testing.assert_close(other.conv1.weight, folded.conv1.weight)


def test_every_part_of_a_map_is_saved(tmp_path):
    model, x, _ = traced("residual")
    plan = intrafuse.plan(model, x, channels=0.5)
    step = plan.maps[-1]
    n, m = step.size, step.width
    step = replace(
        step,
        readers={"conv1.weight": torch.randn(n, m), "short.0.weight": torch.randn(n, m)},
        gain={"conv1.weight": torch.rand(5) + 0.5},
        shift={"short.0.weight": torch.randn(5)},
        writer_gain={"stem.weight": torch.rand(m) + 0.5},
        writer_shift={"stem.weight": torch.randn(m)},
    )
    plan = replace(plan, maps=(*plan.maps[:-1], step))
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.maps[-1].tensors().keys() == step.tensors().keys()
    state = loaded.apply(model).state_dict()
    for key, tensor in plan.apply(model).state_dict().items():
        assert torch.equal(tensor, state[key]), key
