"""Sums, lengths and distances over channels, however they are written, and weights that they scale.

A channel that is dropped adds exactly nothing, so each equals a masked original; what is never zero
without its weights stays.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import Net
from random_networks import randomise
from spellings import LINE, SEQUENCE, network, pruned_widths
from torch import nn
from torch.nn.utils import parametrizations

import intrafuse

INFINITY = float("inf")
LENGTHS = {
    "normalize": lambda n, h: F.normalize(h, dim=1),
    "normalize, p=1": lambda n, h: F.normalize(h, p=1.0, dim=1),
    "norm": lambda n, h: h / h.norm(dim=1, keepdim=True),
    "norm, p=3": lambda n, h: h / h.norm(p=3, dim=1, keepdim=True),
    "norm, p=1/2": lambda n, h: h / h.norm(p=0.5, dim=1, keepdim=True),
    "largest": lambda n, h: h / h.norm(p=INFINITY, dim=1, keepdim=True),
    "vector_norm": lambda n, h: h / torch.linalg.vector_norm(h, dim=1, keepdim=True),
    "linalg.norm": lambda n, h: h / torch.linalg.norm(h, dim=1, keepdim=True),
    "of everything": lambda n, h: h / h.norm(),
    "without the dimension": lambda n, h: h / h.norm(dim=1).unsqueeze(1),
    "by hand": lambda n, h: h / h.pow(2).sum(1, keepdim=True).sqrt(),
    "by hand, eps": lambda n, h: h * torch.rsqrt((h * h).sum(1, keepdim=True) + 1e-6),
    "by hand, half": lambda n, h: h / (h.square().sum(1, keepdim=True) ** 0.5).clamp_min(1e-12),
    "by hand, einsum": lambda n, h: h / torch.einsum("bi,bi->b", h, h).sqrt().unsqueeze(1),
    "absolute values": lambda n, h: h / h.abs().sum(1, keepdim=True),
    "of an activation": lambda n, h: F.normalize(F.gelu(h), dim=1),
    "with a weight": lambda n, h: n.p * F.normalize(F.relu(h), dim=1),
    "of another layer too": lambda n, h: F.normalize(h * n.p.exp(), dim=1),
    "sum": lambda n, h: h * h.sum(1, keepdim=True),
    "masked": lambda n, h: h * h.masked_fill(h > 0, 0.0).sum(1, keepdim=True),
    "chosen": lambda n, h: h * torch.where(h > 0, h, 0.1 * h).sum(1, keepdim=True),
    "cosine_similarity": lambda n, h: h * F.cosine_similarity(h, h.relu(), dim=1)[:, None],
    "module": lambda n, h: h * nn.CosineSimilarity()(h, h.relu())[:, None],
    "vecdot": lambda n, h: h * torch.linalg.vecdot(h, h.relu())[:, None],
    "pairwise_distance": lambda n, h: h * F.pairwise_distance(h, h.relu(), keepdim=True),
    "dist": lambda n, h: h * torch.dist(h, h.relu()),
    "squared differences": lambda n, h: h * (h - h.relu()).square().sum(1, keepdim=True),
    "to prototypes": lambda n, h: h * torch.cdist(h, n.p[None]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_channels_may_go_under_a_length(name):
    model = network(LENGTHS[name], (8,))
    assert pruned_widths(model, LINE, far=1e-10) == [8]


@pytest.mark.parametrize("method", ["intra-fusion", "folding", "moment", "auto"])
def test_channels_are_chosen_under_a_length_but_never_combined(method):
    plan = intrafuse.plan(network(LENGTHS["norm"]), LINE, channels=0.5, method=method)
    (step,) = plan.maps
    assert step.keep is not None and plan.graph.groups[0].chosen == ("its channels are added up",)


STAYS = {
    "never zero": lambda n, h: F.normalize(h.sigmoid(), dim=1),
    "a number is added": lambda n, h: h * (h + 1).sum(1, keepdim=True),
    "a function is added": lambda n, h: F.normalize(h + n.p.exp(), dim=1),
    "another tensor is added": lambda n, h: h * (h + h.sum(1, keepdim=True)).sum(1, keepdim=True),
    "filled": lambda n, h: h * h.masked_fill(h > 0, 1.0).sum(1, keepdim=True),
    "clamped": lambda n, h: F.normalize(h.clamp(min=0.1), dim=1),
    "counted": lambda n, h: h / h.norm(p=0, dim=1, keepdim=True),
    "smallest": lambda n, h: h / h.norm(p=-INFINITY, dim=1, keepdim=True),
    "negative power": lambda n, h: h / h.norm(p=-1, dim=1, keepdim=True),
    "mean": lambda n, h: h * h.mean(1, keepdim=True),
    "largest value": lambda n, h: h / h.amax(1, keepdim=True),
    "a sum by its size": lambda n, h: h * h.sum(1, keepdim=True) / h.shape[1],
    "distance that adds": lambda n, h: h * F.pairwise_distance(h, h.relu(), eps=0.1, keepdim=True),
    "counted differences": lambda n, h: h * torch.cdist(h, n.p[None], p=0.0),
}


@pytest.mark.parametrize("name", STAYS)
def test_channels_stay_where_one_that_is_dropped_would_have_counted(name):
    assert not intrafuse.trace(network(STAYS[name], (8,)), LINE).groups


def test_positions_that_are_mixed_with_a_bias_are_not_zero():
    def mixed(n, x):
        return n.c(F.normalize(n.m(n.a(x).mT).mT, dim=-1))

    for bias in (False, True):
        parts = {"a": nn.Linear(5, 8), "m": nn.Linear(7, 7, bias=bias), "c": nn.Linear(8, 2)}
        model = randomise(Net(mixed, **parts), 0)
        if bias:
            assert not intrafuse.trace(model, SEQUENCE).groups
        else:
            assert pruned_widths(model, SEQUENCE) == [8]


def test_distances_of_two_layers_and_their_rows():
    def between(n, x):
        return torch.cdist(n.a(x), n.b(x.relu()), p=1.0)

    model = randomise(Net(between, a=nn.Linear(5, 8), b=nn.Linear(5, 8)), 0)
    assert pruned_widths(model, SEQUENCE) == [8]


def test_a_number_that_follows_a_size_is_found_where_the_code_has_no_other():
    scaled = network(lambda n, h: h * h.shape[1] ** -0.5)
    assert pruned_widths(scaled, LINE) == [8]

    def products(n, x):
        return n.a(x) @ n.b(x).T / n.a.out_features**0.5

    model = randomise(Net(products, a=nn.Linear(5, 8), b=nn.Linear(5, 8)), 0)
    assert pruned_widths(model, LINE) == [8]


NORMS = {
    "parametrization": (
        parametrizations.spectral_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    ),
    "hook": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_weight_under_spectral_norm_stays_until_it_is_a_plain_one(name):
    put_on, take_off = NORMS[name]
    torch.manual_seed(0)
    layers = put_on(nn.Linear(5, 8)), nn.ReLU(), put_on(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2)
    model = nn.Sequential(*layers).double().eval()
    before = model(LINE)
    graph = intrafuse.trace(model, LINE)
    assert not graph.groups
    reasons = [reason for group in graph.locked for reason in group.locked]
    assert any("as spectral norm does (torch.nn.utils" in reason for reason in reasons)
    for layer in (model[0], model[2]):
        take_off(layer)
    torch.testing.assert_close(model(LINE), before)
    assert pruned_widths(model, LINE) == [8, 8]
