"""Two spellings of one function: every method makes the same of both, to 1e-5.

A rule that reads numbers of the trace, or that knows one spelling only, makes another plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from twin_networks import TWINS, Normed, build

import intrafuse

# `auto` also predicts the error of `select`, `intra-fusion` and `folding` as they are.
METHODS = ("moment", "auto")
PAIRS = [(family, name) for family, known in TWINS.items() for name in [*known.spellings][1:]]


def run(model: nn.Module, x: Tensor, method: str) -> tuple[Tensor, list[Mapping[str, float]]]:
    """Return the pruned network's outputs and the predicted errors of each group's candidates."""
    pruned = intrafuse.prune(model, x[:2], channels=0.4, method=method, check=method == "select")
    with torch.no_grad():
        notes = [note["predicted"] for note in pruned.plan.notes.values()]
        return pruned.model(x.clone()), notes


@pytest.fixture(scope="module")
def first() -> dict:
    """What each method makes of the first spelling of a family, once it was asked."""
    return {}


@pytest.mark.parametrize("family, name", PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_spellings_of_one_function_get_the_same_plan(family, name, first):
    models, x = build(family)
    reference = next(iter(models.values()))
    with torch.no_grad():
        torch.testing.assert_close(models[name](x.clone()), reference(x.clone()))
    last = name == [*models][-1]
    for method in METHODS if last else METHODS[:1]:
        if (family, method) not in first:
            first[family, method] = run(reference, x, method)
        wanted, predicted = first[family, method]
        found, errors = run(models[name], x, method)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=method)
        assert len(errors) == len(predicted)
        for own, other in zip(errors, predicted, strict=True):
            assert own == pytest.approx(other, abs=2e-6), method


@pytest.mark.parametrize("family", TWINS)
@pytest.mark.parametrize("method", ["folding"])
def test_methods_that_weights_alone_decide_agree_too(family, method):
    models, x = build(family)
    one, *_, other = models.values()
    torch.testing.assert_close(run(one, x, method)[0], run(other, x, method)[0])


@pytest.mark.parametrize("method", METHODS)
def test_norms_by_hand_are_as_those_of_torch(method):
    def network(by_hand: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Linear(6, 8), Normed(by_hand, 8), nn.Linear(8, 16), nn.GELU())
        return nn.Sequential(*layers, nn.Linear(16, 5)).eval()

    with torch.random.fork_rng(devices=[]):
        models = network(False), network(True)
        x = 0.1 * torch.randn(64, 6)
    one, other = (run(model, x, method)[0] for model in models)
    torch.testing.assert_close(one, other)
