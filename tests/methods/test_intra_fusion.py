"""Intra-Fusion: laws of its maps, networks on which the answer is known, every option."""

from functools import cache
from itertools import product

import pytest
import torch
from networks import NETWORKS, build, covering, outputs, same_state
from torch import nn

import intrafuse
from intrafuse import Context, IntrafuseError
from intrafuse.importance.metrics import score
from intrafuse.methods import IntraFusion
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

TARGETS = ["important", "k-means", "mixture"]
MARGINALS = ["uniform", "importance", "softmax"]
NORMALISATIONS = ["paper", "barycentric"]
OPTIONS = [
    IntraFusion(),
    IntraFusion(normalisation="barycentric"),
    IntraFusion(target="k-means", source_marginal="importance", p=2),
    IntraFusion(target="mixture", target_marginal="softmax"),
    IntraFusion(p=float("inf"), source_marginal="softmax", target_marginal="importance"),
    IntraFusion(regularisation=0.1, normalisation="barycentric"),
]


@cache
def prepared(name):
    """Trace a network once: the tests below merge snapshots of its folded weights."""
    model, x = build(name)
    graph = intrafuse.trace(model, x)
    weights = Weights.of(graph, model)
    fold_norms(weights)
    return model, x, Context(weights, weights, model, x)


def context_of(model, x):
    weights = Weights.of(intrafuse.trace(model, x), model)
    fold_norms(weights)
    return Context(weights, weights, model, x)


def fuse(model, context, method, widths, scores=None):
    """Do what `plan` and `apply` do, at given widths; also where a group keeps all channels."""
    weights = context.weights.snapshot()
    now = Context(weights, context.original, model, context.example_inputs)
    steps = []
    for group in reversed(weights.graph.groups):
        given = score(group, context, "l1") if scores is None else scores[group.name]
        step = method(group, given, widths(group), now).check()
        weights.merge(step)
        steps.append(step)
    return install(model, weights), steps


def half(group):
    return max(1, group.size // 2)


# --- every option


@pytest.mark.parametrize(("name", "method"), covering(NETWORKS, OPTIONS))
def test_every_network_runs_after_it(name, method):
    model, x, context = prepared(name)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    for widths in (half, lambda group: 1, lambda group: group.size - 1):
        small, steps = fuse(model, context, method, widths)
        for step, group in zip(steps, reversed(context.weights.graph.groups), strict=True):
            n, m = group.size, widths(group)
            assert step.encode.shape == step.carry.shape == (m, n)
            assert step.decode.shape == (n, m) and step.keep is None
        result = outputs(small, x)
        assert torch.isfinite(result).all() and result.shape == outputs(model, x).shape
    assert same_state(model, state)


def test_every_combination_of_options():
    _, _, context = prepared("separable")
    group = context.weights.graph.groups[0]
    scores = score(group, context, "l1")
    orders = (1, 2, float("inf"))
    for choice in product(TARGETS, MARGINALS, MARGINALS, NORMALISATIONS, orders):
        target, source, mass, normalisation, p = choice
        method = IntraFusion(
            target=target,
            source_marginal=source,
            target_marginal=mass,
            normalisation=normalisation,
            p=p,
        )
        step = method(group, scores, 3, context).check()
        assert step.encode.shape == (3, group.size), choice
        assert (step.encode >= 0).all() and (step.decode >= 0).all()
        sums = step.encode.sum(0 if normalisation == "paper" else 1)
        torch.testing.assert_close(sums, torch.ones_like(sums), msg=str(choice))
        torch.testing.assert_close(step.decode.sum(1), torch.ones(group.size), msg=str(choice))
        torch.testing.assert_close(step.carry.sum(1), torch.ones(3), msg=str(choice))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("n", "m"), [(8, 1), (8, 3), (8, 4), (8, 7)])
def test_uniform_mass_is_conserved(n, m, target):
    """Columns of P sum to one and rows to n / m; the barycentric P is m / n of it."""
    _, _, context = prepared("chain")
    group = context.weights.graph.groups[0]
    scores = score(group, context, "l1")
    paper, mean = (
        IntraFusion(target=target, normalisation=kind)(group, scores, m, context)
        for kind in NORMALISATIONS
    )
    torch.testing.assert_close(paper.encode.sum(0), torch.ones(n))
    torch.testing.assert_close(paper.encode.sum(1), torch.full((m,), n / m))
    torch.testing.assert_close(mean.encode, paper.encode * m / n)
    torch.testing.assert_close(mean.decode, paper.decode)
    torch.testing.assert_close(paper.decode, paper.encode.T)


def test_mass_by_importance_is_conserved():
    _, _, context = prepared("chain")
    group = context.weights.graph.groups[0]
    scores = score(group, context, "l1")
    method = IntraFusion(source_marginal="importance", target_marginal="importance")
    step = method(group, scores, 3, context)
    kept = scores.sort(descending=True).values[:3].sort().values
    received = (step.encode @ (scores / scores.sum())).sort().values
    torch.testing.assert_close(received, kept / kept.sum())


# --- where nothing is removed


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_full_width_the_map_is_the_identity(name, p, normalisation):
    model, x, context = prepared(name)
    method = IntraFusion(p=p, normalisation=normalisation)
    same, steps = fuse(model, context, method, lambda group: group.size)
    for step in steps:
        torch.testing.assert_close(step.encode, torch.eye(step.size))
        torch.testing.assert_close(step.decode, torch.eye(step.size))
    torch.testing.assert_close(outputs(same, x), outputs(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["chain", "residual", "separable", "autoencoder", "prelu"])
def test_at_full_width_k_means_permutes_the_channels(name):
    model, x, context = prepared(name)
    same, steps = fuse(model, context, IntraFusion(target="k-means"), lambda group: group.size)
    for step in steps:
        torch.testing.assert_close(step.encode @ step.encode.T, torch.eye(step.size))
        assert set(step.encode.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(outputs(same, x), outputs(model, x), atol=1e-5, rtol=1e-5)


# --- duplicated channels


def doubled(copies=2, *, norm=True):
    """Repeat each hidden channel of a network that has no bias behind the hidden layer."""
    torch.manual_seed(0)
    thin = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.ReLU(), nn.Linear(4, 3)
    )
    wide = nn.Sequential(
        nn.Linear(5, 4 * copies),
        nn.BatchNorm1d(4 * copies) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Linear(4 * copies, 3),
    )
    order = torch.randperm(4 * copies)  # a channel and its copies lie anywhere
    with torch.no_grad():
        if norm:
            thin[1].weight.normal_(), thin[1].bias.normal_()
            thin[1].running_mean.normal_(), thin[1].running_var.uniform_(0.5, 2)
        for old, new in zip(thin[:2], wide[:2], strict=True):
            for key, tensor in old.state_dict().items():
                if tensor.dim():
                    new.state_dict()[key].copy_(tensor.repeat_interleave(copies, 0)[order])
        wide[3].weight.copy_(thin[3].weight.repeat_interleave(copies, 1)[:, order] / copies)
        wide[3].bias.copy_(thin[3].bias)
    return thin.eval(), wide.eval(), (order % copies == 0).float() + 0.01 * torch.rand(4 * copies)


@pytest.mark.parametrize("target", ["important", "k-means"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_duplicated_channels_merge_without_loss(copies, p, target):
    thin, wide, scores = doubled(copies)
    x = torch.randn(20, 5)
    torch.testing.assert_close(outputs(wide, x), outputs(thin, x))
    method = IntraFusion(normalisation="barycentric", p=p, target=target)
    small, _ = fuse(wide, context_of(wide, x), method, lambda group: 4, {"0": scores})
    torch.testing.assert_close(outputs(small, x), outputs(wide, x), atol=1e-5, rtol=1e-5)
    assert small[0].weight.shape == thin[0].weight.shape


@pytest.mark.parametrize("copies", [2, 3])
def test_the_map_of_the_paper_multiplies_duplicated_channels(copies):
    """P and P^T each carry the whole mass, so what the group gives is n / m times as much."""
    _, wide, scores = doubled(copies)
    nn.init.zeros_(wide[3].bias)
    x = torch.randn(20, 5)
    small, _ = fuse(wide, context_of(wide, x), IntraFusion(), lambda group: 4, {"0": scores})
    torch.testing.assert_close(outputs(small, x), copies * outputs(wide, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("copies", [2, 3])
def test_projected_channels_keep_their_weights_and_lose_no_duplicates(copies):
    _, wide, scores = doubled(copies)
    x, context = torch.randn(20, 5), context_of(wide, torch.randn(20, 5))
    method = IntraFusion(normalisation="projected")
    small, (step,) = fuse(wide, context, method, lambda group: 4, {"0": scores})
    torch.testing.assert_close(outputs(small, x), outputs(wide, x), atol=1e-5, rtol=1e-5)
    assert set(step.encode.unique().tolist()) == {0.0, 1.0}


def test_projected_readers_get_the_part_of_a_lost_channel_that_is_alike():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.6, 0.8]])
    model[2].weight.data = torch.tensor([[1.0, 1.0, 5.0]])
    method = IntraFusion(normalisation="projected")
    small = intrafuse.prune(model, torch.ones(1, 2), channels=0.33, method=method).model
    torch.testing.assert_close(small[0].weight, model[0].weight[:2])
    shares = (small[2].weight.detach() - 1).flatten() / 5 / torch.tensor([0.6, 0.8])  # of its mass
    assert (shares >= 0).all() and float(shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", OPTIONS, ids=range(len(OPTIONS)))
def test_more_targets_than_channels_that_differ(method):
    _, wide, _ = doubled(4)
    x = torch.randn(20, 5)
    for width in (5, 9, 15):
        small, steps = fuse(wide, context_of(wide, x), method, lambda group, w=width: w)
        assert torch.isfinite(outputs(small, x)).all() and steps[0].width == width


@pytest.mark.parametrize("method", OPTIONS, ids=range(len(OPTIONS)))
def test_channels_of_zeros(method):
    model, x = build("mlp")
    with torch.no_grad():
        model[0].weight[3:9] = 0
        model[0].bias[3:9] = 0
        model[3].weight[:, 3:9] = 0
    small, _ = fuse(model, context_of(model, x), method, half)
    assert torch.isfinite(outputs(small, x)).all()


# --- invariances


@pytest.mark.parametrize("method", OPTIONS[:2] + OPTIONS[4:], ids=["paper", "mean", "mass", "soft"])
def test_the_order_of_channels_does_not_matter(method):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    order = torch.randperm(9)
    other = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
        other[2].bias.copy_(model[2].bias)
    x = torch.randn(20, 5)
    small, twin = (fuse(m, context_of(m, x), method, half)[0] for m in (model, other))
    torch.testing.assert_close(outputs(small, x), outputs(twin, x), atol=1e-5, rtol=1e-5)


def test_a_single_target_gets_the_mean_or_the_sum():
    model, x = build("mlp")
    context = context_of(model, x)
    group = context.weights.graph.groups[0]
    scores = score(group, context, "l1")
    paper, mean = (
        IntraFusion(normalisation=kind)(group, scores, 1, context) for kind in NORMALISATIONS
    )
    torch.testing.assert_close(paper.encode, torch.ones(1, 12))
    torch.testing.assert_close(mean.encode, torch.full((1, 12), 1 / 12))


def test_the_most_important_channels_keep_their_own_mass():
    """A target is at distance zero of itself, so at p = 1 its channel goes nowhere else."""
    _, _, context = prepared("residual")
    for group in context.weights.graph.groups:
        scores = score(group, context, "l1")
        keep = scores.sort(descending=True).indices[:5].sort().values
        encode = IntraFusion()(group, scores, 5, context).encode
        torch.testing.assert_close(encode[torch.arange(5), keep], torch.ones(5))


@pytest.mark.parametrize("target", ["k-means", "mixture"])
def test_the_seed_decides(target):
    model, x = build("residual")
    method = IntraFusion(target=target)
    states = [
        intrafuse.prune(model, x, channels=0.5, method=method, seed=seed).model.state_dict()
        for seed in (3, 3)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "median"}, "target must be one of important, k-means, mixture; got 'median'"),
        ({"source_marginal": "even"}, "uniform, importance, softmax; got 'even'"),
        ({"target_marginal": "even"}, "uniform, importance, softmax; got 'even'"),
        ({"normalisation": "rows"}, "paper, barycentric, projected; got 'rows'"),
        ({"p": 0.5}, "at least 1; got 0.5"),
        ({"regularisation": -1.0}, "not be negative; got -1.0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    model, x = build("mlp")
    with pytest.raises(IntrafuseError, match=message):
        intrafuse.plan(model, x, channels=0.5, method=IntraFusion(**settings))
