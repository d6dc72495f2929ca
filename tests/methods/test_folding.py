"""Folding: known answers for clusters, gains and statistics; laws on every tiny network."""

import warnings
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from networks import NETWORKS, build, copy_channels, outputs
from torch import nn
from torch.testing import assert_close

import intrafuse
from intrafuse import Context, IntrafuseError
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.methods import Folding
from intrafuse.methods.folding import cluster, clustering_features, repair_gain
from intrafuse.study.evaluate import accuracy
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

STARTS = ["ward", "k-means++"]
FEATURES = ["balanced", "plain", "writers"]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def context_of(model, x):
    weights = Weights.of(intrafuse.trace(model, x), model)
    fold_norms(weights)
    return Context(weights, weights, model, x)


@cache
def prepared(name):
    """Trace a network once: the tests below merge snapshots of its folded weights."""
    model, x = build(name)
    return model, x, context_of(model, x)


def fold(context, method, width):
    """Do what `plan` and `apply` do, at given widths; also where a group keeps all channels."""
    now = replace(context, weights=context.weights.snapshot())
    steps = {}
    for group in reversed(now.weights.graph.groups):
        step = method(group, torch.rand(group.size), width(group), now).check()
        now.weights.merge(step)
        steps[group.name] = step
    return install(context.model, now.weights), steps


def half(group):
    return -(-group.size // 2)


def white_layers(first, norm, *rest):
    """Let a norm's statistics be those that the layer has where its inputs are white noise.

    These are the assumptions of the paper's repair: inputs with mean 0 and variance 1, without
    correlation. Then the norm's output has mean beta and standard deviation |gamma|. No two
    outputs are negatively correlated, some of them after a negative gamma.
    """
    with torch.no_grad():
        nn.init.uniform_(norm.weight, 0.3, 2.0)
        norm.weight[::3].neg_()
        nn.init.normal_(norm.bias)
        signs = norm.weight.sign().view(-1, *[1] * (first.weight.dim() - 1))
        first.weight.copy_(first.weight.abs() * signs)
        norm.running_mean.copy_(first.bias)
        norm.running_var.copy_(first.weight.flatten(1).square().sum(1))
    norm.eps = 0.0
    return nn.Sequential(first, norm, *rest).eval()


# --- clusters


@pytest.mark.parametrize("start", STARTS)
def test_clusters_far_apart_are_found(start):
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(6, 9, generator=generator)
    order = torch.randperm(30, generator=generator)
    truth = torch.arange(6).repeat(5)[order]
    points = centers[truth] + torch.randn(30, 9, generator=generator)
    labels = cluster(points, 6, start=start)
    assert_close(labels[:, None] == labels, truth[:, None] == truth)
    firsts = [labels.tolist().index(k) for k in range(6)]
    assert firsts == sorted(firsts)


def inertia(points, labels):
    return sum(
        float((points[labels == k] - points[labels == k].mean(0)).square().sum())
        for k in labels.unique()
    )


@pytest.mark.parametrize("start", STARTS)
def test_no_single_move_improves_the_clusters(start):
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()
    labels = cluster(points, 4, start=start, seed=3)
    found = inertia(points, labels)
    for i, k in product(range(12), range(4)):
        moved = labels.clone()
        moved[i] = k
        if len(moved.unique()) == 4:
            assert inertia(points, moved) >= found - 1e-9


def test_the_best_of_all_clusterings_is_nearly_reached():
    """Of 7 points into 3 clusters there are 301; local optima lie close to the best."""
    points = torch.randn(7, 2, generator=torch.Generator().manual_seed(2)).double()
    every = torch.tensor([c for c in product(range(3), repeat=7) if len(set(c)) == 3])
    best = min(inertia(points, labels) for labels in every)
    assert best <= inertia(points, cluster(points, 3)) <= 1.3 * best


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(9, 4),
        torch.ones(9, 4),
        torch.eye(9)[torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])],
        torch.randn(9, 4, generator=torch.Generator().manual_seed(0)),
        1e-20 * torch.arange(9.0)[:, None],
    ],
    ids=["zeros", "equal", "three distinct", "random", "tiny"],
)
def test_the_width_is_exact(points, start):
    for width in range(1, 10):
        labels = cluster(points, width, start=start, seed=width)
        assert sorted(set(labels.tolist())) == list(range(width))


def test_the_seed_decides_where_k_means_plus_plus_starts():
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    draws = [cluster(points, 20, start="k-means++", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(cluster(points, 20, seed=0), cluster(points, 20, seed=1))


# --- the gain


def mean_of(*clusters):
    member = torch.zeros(len(clusters), sum(map(len, clusters)))
    for k, members in enumerate(clusters):
        member[k, list(members)] = 1 / len(members)
    return member


def test_the_gain_is_that_of_the_paper():
    """N / sqrt(N + (N^2 - N) E[c]), with E[c] the mean cosine between different members."""
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).abs()
    clusters = (0, 4, 5, 8), (1, 2), (3,), (6, 7)
    gain = repair_gain(rows, torch.full((9,), 2.5), mean_of(*clusters))
    for got, members in zip(gain, clusters, strict=True):
        size, unit = len(members), nn.functional.normalize(rows[list(members)], dim=1)
        pairs = size**2 - size
        correlation = (float((unit @ unit.T).sum()) - size) / pairs if pairs else 0
        assert_close(float(got), size / (size + pairs * correlation) ** 0.5)


@pytest.mark.parametrize(
    "rows, deviation, gain",
    [
        ([[1, 0], [0, 1]], [1, 3], 2 / 2.5**0.5),  # std 2 wanted, variance (1 + 9) / 4 found
        ([[1, 0], [5, 0]], [1, 3], 1.0),  # fully correlated: nothing was lost
        ([[1, 0], [-1, 0]], [1, 1], 2**0.5),  # opposite: treated as uncorrelated
        ([[0, 0], [0, 7]], [0, 4], 1.0),  # a dead channel halves the other, as it should
        ([[0, 0], [0, 0]], [0, 0], 1.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1, 1, 1], 3**0.5),
    ],
)
def test_gains_by_hand(rows, deviation, gain):
    rows, deviation = torch.tensor(rows).float(), torch.tensor(deviation).float()
    found = repair_gain(rows, deviation, mean_of(range(len(rows))))
    assert_close(found, torch.tensor([gain]))


def test_a_cluster_of_one_has_gain_exactly_one():
    generator = torch.Generator().manual_seed(0)
    rows, deviation = torch.randn(50, 7, generator=generator), torch.rand(50, generator=generator)
    assert torch.equal(repair_gain(rows, deviation, torch.eye(50)), torch.ones(50))


# --- statistics after folding


def test_merged_outputs_have_the_mean_and_deviation_of_their_members():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1)
    model = white_layers(*layers)
    small, steps = fold(context_of(model, torch.zeros(1, 3, 4, 4)), Folding(), lambda group: 5)
    mean = steps["0"].encode
    norms = small[0].weight.flatten(1).norm(dim=1)
    assert_close(norms, mean @ model[1].weight.abs(), atol=1e-5, rtol=1e-5)
    assert_close(small[0].bias, mean @ model[1].bias, atol=1e-5, rtol=1e-5)
    readers = model[3].weight.flatten(1) @ (mean > 0).float().T
    assert_close(small[3].weight.flatten(1), readers)


def test_each_output_of_a_wide_channel_has_its_own_statistics():
    """Whole groups of a grouped convolution go: a channel is two outputs of the layer before."""
    torch.manual_seed(0)
    second = nn.Conv2d(12, 12, 3, groups=6)
    second.weight.data.abs_()
    model = white_layers(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), second, nn.Conv2d(12, 4, 1))
    small, steps = fold(context_of(model, torch.zeros(1, 3, 8, 8)), Folding(), lambda group: 3)
    mean = steps["0"].encode.repeat_interleave(2, 0).repeat_interleave(2, 1)
    mean = mean * torch.eye(2).repeat(3, 6)
    norms = small[0].weight.flatten(1).norm(dim=1)
    assert_close(norms, mean @ model[1].weight.abs(), atol=1e-5, rtol=1e-5)
    assert_close(small[0].bias, mean @ model[1].bias, atol=1e-5, rtol=1e-5)
    kept = mean @ second.weight.flatten(1).norm(dim=1)  # has no norm: rows keep their length
    assert_close(small[2].weight.flatten(1).norm(dim=1), kept, atol=1e-5, rtol=1e-5)


def test_every_writer_of_a_residual_sum_has_its_own_repair():
    model, _, context = prepared("residual")
    _, steps = fold(context, Folding(), half)
    step = steps["conv2"]
    assert set(step.writer_gain) == {"conv2.weight", "short.0.weight"}
    assert not torch.equal(*step.writer_gain.values())
    for weight, norm in (("conv2.weight", model.bn2), ("short.0.weight", model.short[1])):
        expected = (1 - step.writer_gain[weight]) * (step.encode @ norm.bias)
        assert_close(step.writer_shift[weight], expected)


def test_without_batch_norm_rows_keep_their_mean_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4)).eval()
    small, steps = fold(context_of(model, torch.zeros(1, 5)), Folding(), lambda group: 4)
    step = steps["0"]
    assert not step.writer_shift
    mean, gain = step.encode, step.writer_gain["0.weight"]
    assert_close(small[0].weight.norm(dim=1), mean @ model[0].weight.norm(dim=1))
    assert_close(small[0].bias, gain * (mean @ model[0].bias))
    assert_close(small[2].weight, model[2].weight @ (mean > 0).float().T)


def test_without_repair_clusters_are_only_averaged():
    _, steps = fold(prepared("chain")[2], Folding(correction="none"), half)
    for step in steps.values():
        assert not step.writer_gain and not step.writer_shift
        member = step.decode
        assert_close(step.encode @ member, torch.eye(step.width))
        assert torch.equal(member.sum(1), torch.ones(step.size))


# --- laws on every network


@pytest.mark.parametrize("name", NETWORKS)
def test_duplicated_channels_fold_without_loss(name):
    model, x = build(name)
    copy_channels(model, prepared(name)[2].weights.graph)
    weights = Weights.of(prepared(name)[2].weights.graph, model)
    fold_norms(weights)
    context = Context(weights, weights, model, x)
    for start in STARTS:
        small, steps = fold(context, Folding(features="writers", start=start), half)
        for step in steps.values():
            assert torch.equal(step.encode[0].nonzero().flatten(), torch.tensor([0, 1]))
        assert_close(outputs(small, x), outputs(model, x), atol=1e-4, rtol=1e-4)


def test_two_pairs_of_copies_fold_without_loss():
    """Copies are found although what reads them differs a little."""
    torch.manual_seed(0)
    model = white_layers(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
            if tensor.dim():
                tensor[[4, 6]] = tensor[[1, 3]]
        model[3].weight[:, [4, 6]] = model[3].weight[:, [1, 3]] + 0.01
    x = torch.randn(5, 6)
    context = context_of(model, x)
    for features in FEATURES:
        small, steps = fold(context, Folding(features=features), lambda group: 5)
        assert_close(outputs(small, x), outputs(model, x), atol=1e-4, rtol=1e-4)
        alone = torch.tensor([0, 2, 4])  # channels 0, 2 and 5, numbered in order
        assert torch.equal(steps["0"].writer_gain["0.weight"][alone], torch.ones(3))
        assert torch.equal(steps["0"].writer_shift["0.weight"][alone], torch.zeros(3))
        assert torch.equal(steps["0"].encode[alone], torch.eye(7)[[0, 2, 5]])


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_all_channels_changes_nothing(name):
    model, x, context = prepared(name)
    small, steps = fold(context, Folding(), lambda group: group.size)
    for step in steps.values():
        assert torch.equal(step.encode, torch.eye(step.size))
        assert torch.equal(step.decode, torch.eye(step.size))
        assert all(torch.equal(gain, torch.ones_like(gain)) for gain in step.writer_gain.values())
    assert_close(outputs(small, x), outputs(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [lambda group: 1, half], ids=["one", "half"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_folded(name, features, width):
    _, x, context = prepared(name)
    small, steps = fold(context, Folding(features=features), width)
    again, _ = fold(context, Folding(features=features), width)
    assert torch.isfinite(outputs(small, x)).all()
    assert torch.equal(outputs(small, x), outputs(again, x))
    for group in context.weights.graph.groups:
        assert steps[group.name].width == width(group)


def test_one_channel_is_the_mean_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    small, _ = fold(
        context_of(model, torch.zeros(1, 5)), Folding(correction="none"), lambda group: 1
    )
    assert_close(small[0].weight, model[0].weight.mean(0, keepdim=True))
    assert_close(small[2].weight, model[2].weight.sum(1, keepdim=True))


@pytest.mark.parametrize("dead", [range(0, 12, 2), range(12)], ids=["half", "all"])
def test_dead_channels_stay_finite(dead):
    """A scale of zero leaves weights of zero; a shift of zero makes them alike."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1)
    model = white_layers(*layers)
    with torch.no_grad():
        model[1].weight[list(dead)] = 0
        model[1].bias[list(dead)] = 0
    x = torch.randn(2, 3, 4, 4)
    context = context_of(model, x)
    for features, start in product(FEATURES, STARTS):
        method = Folding(features=features, start=start)
        for width in (1, 7):
            small, _ = fold(context, method, lambda group, width=width: width)
            assert torch.isfinite(outputs(small, x)).all()
        if features != "plain" or len(dead) == 12:  # else readers keep dead channels apart
            assert_close(outputs(small, x), outputs(model, x), atol=1e-4, rtol=1e-4)


def test_features_are_balanced_by_rescaling_channels():
    """What ReLU cannot tell apart has the same features; the product of the norms stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.zeros(1, 5)
    group = intrafuse.trace(model, x).groups[0]
    before = clustering_features(group, context_of(model, x), "balanced")
    writers, readers = before.split([6, 4], 1)
    assert_close(writers.norm(dim=1), readers.norm(dim=1))
    scale = torch.rand(6) + 0.5
    with torch.no_grad():
        model[0].weight *= scale[:, None]
        model[0].bias *= scale
        model[2].weight /= scale
    assert_close(clustering_features(group, context_of(model, x), "balanced"), before)
    assert clustering_features(group, context_of(model, x), "writers").shape == (6, 6)


def test_importance_does_not_enter():
    context = prepared("chain")[2]
    group = context.weights.graph.groups[0]
    one, other = (Folding()(group, torch.rand(group.size), 3, context) for _ in range(2))
    assert torch.equal(one.encode, other.encode)


@pytest.mark.parametrize(
    "settings", [{"correction": "exact"}, {"features": "readers"}, {"start": "random"}]
)
def test_unknown_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(IntrafuseError, match=f"{name} must be one of"):
        Folding(**settings)


def test_repair_saves_a_trained_network(shared):
    """Measured on 10,000 images at 50 %: 70 with repair, 31 without."""
    found = resolve_model("vgg11_bn")
    model = found.model.eval()
    load_weights(model, str(shared / "models" / "vgg11_bn_cifar10.safetensors"))
    data = load_data(f"cifar10:{shared / 'data' / 'cifar10'}").take(200)
    with_repair, without = (
        accuracy(
            intrafuse.prune(
                model, found.example_inputs, channels=0.5, method=Folding(correction=correction)
            ).model,
            data,
        )
        for correction in ("approximate", "none")
    )
    assert with_repair > 60 > 45 > without
