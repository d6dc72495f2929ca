"""The owner of a network's tensors: nobody else writes, and what depends on a change follows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intrafuse import MergeMap, fold_batchnorm
from intrafuse.graph import trace
from intrafuse.graph.groups import Slot
from intrafuse.moments.propagate import Propagation
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

MEAN, SPREAD = [1.0, 2.0, -1.0], [2.0, 3.0, 4.0]


def folded() -> Weights:
    """Outputs of mean 1, 2, -1 and spread 2, 3, 4; the first two rows at an angle of 60 degrees."""
    model = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, eps=0.0), nn.ReLU(), nn.Linear(3, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.0, 7.0]]))
        model[1].weight.copy_(torch.tensor([2.0, -3.0, 4.0]))
        model[1].bias.copy_(torch.tensor(MEAN))
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    fold_norms(weights)
    return weights


def told(weights: Weights) -> tuple[list[float], list[float]]:
    mean, spread = weights.statistics["0.weight"]
    return mean.tolist(), spread.tolist()


# --- statistics -----------------------------------------------------------------------------


def test_statistics_of_selected_channels_are_their_own():
    weights = folded()
    assert told(weights) == (MEAN, SPREAD)
    weights.merge(MergeMap.select("0", 3, torch.tensor([0, 2])))
    assert told(weights) == ([1.0, -1.0], [2.0, 4.0])


@pytest.mark.parametrize(
    ("share", "spread"),
    [
        ([0.5, 0.5, 0.0], (1 + 2.25 - 1.5) ** 0.5),  # the norm turns the second row round
        ([0.5, -0.5, 0.0], (1 + 2.25 + 1.5) ** 0.5),
        ([1.0, 0.0, 0.0], 2.0),
    ],
)
def test_statistics_of_combined_channels_count_with_the_cosine_of_their_rows(share, spread):
    weights = folded()
    encode = torch.tensor([share, [0.0, 0.0, 1.0]])
    weights.merge(MergeMap.linear("0", encode))
    mean, std = (torch.tensor(line) for line in told(weights))
    torch.testing.assert_close(mean, encode @ torch.tensor(MEAN))
    torch.testing.assert_close(std, torch.tensor([spread, 4.0]))


def test_statistics_follow_the_gains_and_shifts_of_writers():
    weights = folded()
    step = MergeMap.select(
        "0",
        3,
        torch.tensor([0, 2]),
        writer_gain={"0.weight": torch.tensor([-3.0, 0.5])},
        writer_shift={"0.weight": torch.tensor([10.0, 20.0])},
    )
    weights.merge(step)
    assert told(weights) == ([1.0 * -3 + 10, -1 * 0.5 + 20], [2.0 * 3, 4 * 0.5])
    weights.rescale("0.weight", torch.tensor([2.0, 1.0]), None)
    assert told(weights) == ([14.0, 19.5], [12.0, 2.0])
    weights.rescale("0.weight", None, torch.tensor([0.0, 1.0]))
    assert told(weights) == ([14.0, 20.5], [12.0, 2.0])


def test_gains_of_readers_restore_what_the_statistics_say():
    """Here the layer reads channels of the one before it, and its own outputs have statistics."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    fold_norms(weights)
    before = [line.clone() for line in weights.statistics["2.weight"]]
    bias = weights.state["2.bias"]
    line = torch.tensor([3.0, 5.0])
    keep = torch.arange(2)
    weights.merge(MergeMap.select("0", 3, keep, gain={"2.weight": line}, shift={"2.weight": -line}))
    torch.testing.assert_close(weights.state["2.bias"], bias * line - line)
    for old, now in zip(before, weights.statistics["2.weight"], strict=True):
        torch.testing.assert_close(now, old, atol=0, rtol=0)


def test_statistics_are_those_of_what_the_layer_computes_after_any_merge():
    """Independent inputs of spread 1: a merged output's spread is the norm of its row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, False), nn.BatchNorm1d(5, eps=0.0), nn.Linear(5, 2))
    model[1].running_var = model[0].weight.detach().square().sum(1)
    model[1].bias.data = torch.randn(5)
    weights = Weights.of(trace(model.eval(), torch.zeros(2, 4)), model)
    fold_norms(weights)
    gain = {"0.weight": torch.rand(3) - 0.5}
    weights.merge(MergeMap.linear("0", torch.randn(3, 5), writer_gain=gain))
    mean, spread = weights.statistics["0.weight"]
    torch.testing.assert_close(spread, weights.state["0.weight"].norm(dim=1))
    torch.testing.assert_close(mean, weights.state["0.bias"])


# --- folded norms ---------------------------------------------------------------------------


def moments(weights: Weights) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what the norm of `Sequential(Linear, norm, Linear)` puts out."""
    node = next(n for n in weights.graph.program.nodes if "batch_norm" in str(n.target))
    found = Propagation(weights).of(node)
    assert found is not None
    return found.mean, found.covariance


def single(scale: float, running: float) -> tuple[nn.Module, Weights]:
    layer, norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)
    model = nn.Sequential(layer, norm, nn.Linear(1, 1)).eval()
    with torch.no_grad():
        layer.weight.fill_(scale)
        layer.bias.fill_(7.0)
        norm.bias.fill_(5.0)
        norm.running_mean.fill_(running)
        norm.running_var.fill_(9.0)
    return model, Weights.of(trace(model, torch.zeros(2, 1)), model)


@pytest.mark.parametrize("running", [0.0, 1.0])
def test_a_norm_that_was_not_folded_tells_its_statistics_whatever_they_are(running):
    _, weights = single(2.0, running)
    assert not weights.folded
    mean, covariance = moments(weights)
    torch.testing.assert_close(mean, torch.tensor([5.0]).double())
    torch.testing.assert_close(covariance, torch.ones(1, 1).double())


def test_a_norm_that_was_folded_passes_what_it_reads():
    """Outputs are 2 x / 3 + 7 / 3 + 5: the layer's statistics say so, and without them its rows."""
    model, weights = single(2.0, 0.0)
    fold_norms(weights)
    assert weights.folded == {"1.running_mean"} == weights.snapshot().folded
    weights.note("0.weight", torch.tensor([11.0]), torch.tensor([4.0]))
    mean, covariance = moments(weights)
    assert (mean.item(), covariance.item()) == (11.0, 16.0)
    weights.forget()
    mean, covariance = moments(weights)
    torch.testing.assert_close(mean, torch.tensor([5 + 7 / 3]).double())
    torch.testing.assert_close(covariance, torch.tensor([[4 / 9]]).double())
    again = fold_batchnorm(model, torch.zeros(2, 1))
    later = Weights.of(trace(again, torch.zeros(2, 1)), again)  # folded before it came here
    assert later.folded == {"1.running_mean"}
    torch.testing.assert_close(moments(later)[0], mean)


# --- ownership ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "sizes", "statistics"])
def test_nobody_else_writes(name):
    weights = folded()
    view = getattr(weights, name)
    key = next(iter(view))
    with pytest.raises(TypeError):
        view[key] = view[key]
    with pytest.raises(AttributeError):
        setattr(weights, name, {})
    kept = weights.snapshot()
    weights.merge(MergeMap.select("0", 3, torch.tensor([1])))
    weights.forget()
    assert kept.state["0.weight"].shape == (3, 2) and told(kept) == (MEAN, SPREAD)
    assert set(kept.sizes.values()) == set(folded().sizes.values())


def test_tensors_are_put_at_the_sizes_that_they_have_now():
    weights = folded()
    weights.merge(MergeMap.select("0", 3, torch.tensor([1])))
    weights.put({"0.weight": torch.ones(1, 2)})
    assert weights.state["0.weight"].tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match=r"0.weight must have the shape \(1, 2\)"):
        weights.put({"0.weight": torch.ones(3, 2)})


# --- what a map says ------------------------------------------------------------------------


def test_a_map_says_what_becomes_of_each_slot():
    n, m, places = 4, 2, 3
    combined = MergeMap.linear(
        "g",
        torch.rand(m, n),
        readers={"own": torch.rand(n, m), "all": torch.rand(n * places, m * places)},
        writers={"heads": torch.rand(places, m, n)},
    ).check()
    chosen = MergeMap.select("g", n, torch.tensor([1, 3]), readers={"own": torch.rand(n, m)})
    said = {}
    for name, step in (("combined", combined), ("chosen", chosen)):
        for slot in ("writer weight heads", "writer weight other", "carrier scale other",
                     "carrier variance other", "carrier shift other", "reader weight own",
                     "reader weight all", "reader weight other"):  # fmt: skip
            role, kind, parameter = slot.split()
            change = step.change(Slot(parameter, 0, role, kind, ()))  # type: ignore[arg-type]
            said[name, slot] = change.kind
            if kind in ("scale", "variance") and name == "combined":
                assert change.tensor is step.carry
    assert {slot for slot in said if said[slot] == "select"} == {
        ("chosen", slot) for _, slot in said if slot != "reader weight own"
    }
    assert [slot for slot in said if said[slot] == "mix"] == [("combined", "reader weight all")]
    assert combined.encoding.tensor is combined.encode and chosen.encoding.tensor is chosen.keep
