"""Predicted error: known answers and Monte Carlo; maps beside each other; analytic gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, build, covering, outputs
from torch import Tensor, nn

import intrafuse
from intrafuse import MergeMap
from intrafuse.graph import trace
from intrafuse.methods import METHODS, Folding, Select
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import readings
from intrafuse.moments.readout import beside, predicted_error, with_readout
from intrafuse.surgery.weights import Weights


def seeded(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(*layers)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model.eval()


@pytest.fixture
def linear():
    """A writer of correlated Gaussian channels with a mean, and its reader."""
    model = seeded(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3))
    graph = trace(model, torch.zeros(2, 4))
    weights = Weights.of(graph, model)
    return model, graph.groups[0], weights, readings(graph.groups[0], Propagation(weights))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disagreement(old: Tensor, new: Tensor) -> float:
    """Measure 1 - Lin's concordance of samples (samples, outputs), weighted by old variance."""
    both = ((old - old.mean(0)) * (new - new.mean(0))).mean(0)
    apart = (old.mean(0) - new.mean(0)).square()
    whole = old.var(0, correction=0) + new.var(0, correction=0) + apart
    weight = old.var(0)
    return float(weight @ (1 - 2 * both / whole) / weight.sum())


def beside_one(step, group, weights):
    """Read old and new channels of one map, and say how they were widened."""
    wide = weights.snapshot()
    wide.merge(beside(group.name, step.size, [step]))
    n = step.size
    return {
        name: replace(r.narrowed(slice(0, n), slice(n, None)), taps=r.taps[:, :n])
        for name, r in readings(group, Propagation(wide)).items()
    }


# --- predicted error


def test_nothing_removed_errs_by_nothing(linear):
    _, group, weights, found = linear
    step = MergeMap.select(group.name, 6, torch.arange(6))
    assert predicted_error(step, found, weights) == pytest.approx(0, abs=1e-12)
    solved = with_readout(step, found, weights, ridge=0)
    assert predicted_error(solved, found, weights) == pytest.approx(0, abs=1e-6)


def test_independent_channels_err_by_one(linear):
    _, group, weights, found = linear
    step = MergeMap.select(group.name, 6, torch.arange(6))
    alien = {name: replace(r, cross=0 * r.cross) for name, r in found.items()}
    assert predicted_error(step, alien, weights) == pytest.approx(1)


def test_opposite_outputs_err_by_two(linear):
    _, group, weights, found = linear
    step = MergeMap.select(group.name, 6, torch.arange(6))
    (name,) = found
    bias = weights.state["2.bias"].double()
    mean = found[name].taps.sum(2) @ found[name].old_mean + bias
    turned = replace(step, gain={name: -torch.ones(3)}, shift={name: 2 * mean})
    assert predicted_error(turned, found, weights) == pytest.approx(2)


def test_a_shifted_mean_by_hand(linear):
    """1 - 2 v / (2 v + d^2) for outputs of variance v that are shifted by d."""
    _, group, weights, found = linear
    step = MergeMap.select(group.name, 6, torch.arange(6))
    (name,) = found
    old = found[name].taps.squeeze(2)
    v = (old @ found[name].old @ old.T).diagonal()
    d = torch.tensor([1.0, 0.0, -2.0]).double()
    error = predicted_error(replace(step, shift={name: d}), found, weights)
    assert error == pytest.approx(float(v @ (1 - 2 * v / (2 * v + d * d)) / v.sum()))


def test_no_reader_errs_by_nothing(linear):
    _, group, weights, _ = linear
    assert predicted_error(MergeMap.select(group.name, 6, torch.arange(2)), {}, weights) == 0


def test_a_reader_without_spread_errs_by_nothing(linear):
    _, group, weights, found = linear
    still = {name: replace(r, old=0 * r.old, new=0 * r.new, cross=0 * r.cross) for name, r in
             found.items()}  # fmt: skip
    step = MergeMap.select(group.name, 6, torch.arange(6))
    assert predicted_error(step, still, weights) == 0


@pytest.mark.parametrize("solve", [None, True, False])
@pytest.mark.parametrize("kind", ["select", "random", "folding"])
def test_the_prediction_is_what_samples_show(linear, kind, solve):
    model, group, weights, _ = linear
    scores = torch.arange(6.0)
    if kind == "select":
        step = MergeMap.select(group.name, 6, torch.tensor([0, 2, 5]))
    elif kind == "random":
        step = MergeMap.linear(group.name, noise(3, 6), noise(6, 3, seed=2))
    else:
        made = intrafuse.plan(
            model, torch.zeros(1, 4), channels=0.5, method="folding", importance=lambda g, c: scores
        )
        (step,) = made.maps
    found = beside_one(step, group, weights)
    if solve is not None:
        step = with_readout(step, found, weights, solve=solve)
    else:
        step = replace(step, gain={"2.weight": noise(3)}, shift={"2.weight": noise(3, seed=5)})
    changed = weights.snapshot()
    changed.merge(step)
    x = noise(400_000, 4)
    names = "0.weight", "0.bias", "2.weight", "2.bias"
    first, bias, second, last = (changed.state[name] for name in names)
    new = (x @ first.T + bias) @ second.T + last
    want = disagreement(outputs(model, x).double(), new.double())
    assert predicted_error(step, found, weights) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_readout_of_its_own_is_never_predicted_worse(linear, width):
    _, group, weights, found = linear
    keep = torch.arange(width)
    step = MergeMap.select(group.name, 6, keep)
    part = {name: r.narrowed(slice(None), keep) for name, r in found.items()}
    solved = with_readout(step, part, weights, ridge=0)
    plain = predicted_error(step, part, weights)
    gains = predicted_error(with_readout(step, part, weights, solve=False), part, weights)
    assert predicted_error(solved, part, weights) <= min(plain, gains) + 1e-6


# --- maps beside each other


def test_old_channels_stay_and_maps_stand_behind_them():
    model, x = build("chain")
    graph = trace(model, x)
    group = graph.by_name["0"]
    folded = intrafuse.plan(model, x, channels=0.5, method="folding", include=["0"]).maps[0]
    kept = MergeMap.select("0", 8, torch.tensor([1, 4, 6]))
    both = beside("0", 8, [kept, folded])
    assert both.size == 8 and both.width == 8 + 3 + 4
    assert torch.equal(both.encode[:8], torch.eye(8))
    assert torch.equal(both.encode[8:11], kept.encode)
    assert torch.equal(both.encode[11:], folded.encode)
    assert torch.equal(both.decode, torch.eye(8, 15))
    for name, gain in folded.writer_gain.items():
        wide = both.writer_gain[name]
        assert torch.equal(wide[:11], torch.ones_like(wide[:11])) and torch.equal(wide[11:], gain)
        assert torch.equal(both.writer_shift[name][11:], folded.writer_shift[name])
        assert not both.writer_shift[name][:11].any()
    assert folded.writer_gain and both.check() is both and group.size == 8


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"tied", "twice"}))
def test_a_widened_network_computes_the_same(name):
    """Readers go on reading the old channels, so that nothing changes."""
    model, x = build(name)
    made = intrafuse.plan(model, x, channels=0)
    for group in made.graph.groups:
        if (
            any(
                slot.role == "carrier" and slot.parameter in made.graph.layers
                for slot in group.slots
            )
            or name == "groupnorm"
        ):
            continue  # grouped convolutions would need whole groups
        keep = MergeMap.select(group.name, group.size, torch.arange(group.size)[::2])
        wide = replace(made, maps=(beside(group.name, group.size, [keep, keep]),))
        torch.testing.assert_close(outputs(wide.apply(model), x), outputs(model, x))


# --- gains from analytic moments


@pytest.mark.parametrize("method", ["select", "intra-fusion", Folding(correction="none")])
def test_analytic_repair_restores_mean_and_variance(method):
    """Exact where unit inputs reach a group through one layer and one known activation."""
    model = seeded(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    x = noise(300_000, 6)
    settings = {"channels": 0.5, "method": method}
    old = outputs(model, x).double()
    plain, repaired = (
        outputs(intrafuse.prune(model, x[:2], **settings, repair=repair).model, x).double()
        for repair in (None, "analytic")
    )
    torch.testing.assert_close(repaired.mean(0), old.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(repaired.std(0), old.std(0), rtol=0.02, atol=0)
    assert (plain.mean(0) - old.mean(0)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "method"),
    covering(NETWORKS, METHODS),
)
def test_analytic_repair_composes_with_every_method(name, method):
    model, x = build(name)
    pruned = intrafuse.prune(model, x, channels=0.6, method=method, repair="analytic")
    assert torch.isfinite(outputs(pruned.model, x)).all()
    assert outputs(pruned.model, x).shape == outputs(model, x).shape
    assert pruned.plan.settings["repair"] == "analytic"


def test_analytic_repair_leaves_maps_with_gains_alone():
    model, x = build("residual")
    settings = {"channels": 0.5, "method": "moment"}
    repaired = intrafuse.plan(model, x, **settings, repair="analytic")
    for a, b in zip(repaired.maps, intrafuse.plan(model, x, **settings).maps, strict=True):
        assert a.tensors().keys() == b.tensors().keys()
        assert all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


def test_analytic_repair_survives_a_file(tmp_path):
    model, x = build("chain")
    made = intrafuse.plan(model, x, channels=0.5, method=Select(), repair="analytic")
    made.save(tmp_path / "plan")
    loaded = intrafuse.Plan.load(tmp_path / "plan")
    assert loaded.settings["repair"] == "analytic"
    assert torch.equal(outputs(loaded.apply(model), x), outputs(made.apply(model), x))


def test_removing_nothing_repairs_nothing():
    model, x = build("chain")
    pruned = intrafuse.prune(model, x, channels=0, repair="analytic")
    assert not pruned.plan.maps
    assert torch.equal(outputs(pruned.model, x), outputs(model, x))
