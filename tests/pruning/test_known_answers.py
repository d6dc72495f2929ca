"""Parts of merging and restoring that networks run without: each held against a known answer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import build
from torch import Tensor, nn

import intrafuse
from intrafuse import MergeMap
from intrafuse.allocation.budget import Budget, choose_widths
from intrafuse.fusing.align import align
from intrafuse.fusing.members import Member
from intrafuse.fusing.restore import analytic_restore
from intrafuse.graph import trace
from intrafuse.graph.export import export_program
from intrafuse.graph.sizes.compare import Expected, calls, first_difference
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.moments.calibrate import Calibration
from intrafuse.moments.damage import damage_by_width
from intrafuse.moments.propagate import Propagation
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.weights import Weights

# --- predicted damage -----------------------------------------------------------------------


class Stream(nn.Module):
    """A block of independent hidden units adds to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, 2, bias=False), nn.Linear(2, 2)
        self.up, self.down = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.enter.weight.copy_(torch.tensor([[3.0, 0, 0], [0, 5.0, 0]]))
            self.up.weight.copy_(torch.eye(3))
            self.down.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0, 0, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enter(x) + self.down(self.up(x)))


def test_damage_counts_as_the_share_of_the_stream():
    """Noise to signal is 1e6, 5/9, 1/13 and 0; the block gives 14 of 14 + 34 of the variance."""
    model = Stream()
    weights = Weights.of(trace(model, torch.zeros(2, 3)), model)
    group = weights.graph.by_name["up"]
    found = damage_by_width([group], weights)["up"]
    share = 14 / (14 + 9 + 25)
    np.testing.assert_allclose(found, share * np.array([1e6, 5 / 9, 1 / 13, 0]), rtol=1e-6)


# --- moments of norms and of data -----------------------------------------------------------


def test_layer_norm_takes_off_what_all_channels_have_in_common():
    """Of 3 s + e_i the norm leaves e_i minus their mean, of variance one on average."""
    n = 4
    layer = nn.Linear(n + 1, n, bias=False)
    model = nn.Sequential(layer, nn.LayerNorm(n, eps=0.0))
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.full((n, 1), 3.0), torch.eye(n)], 1))
    graph = trace(model, torch.zeros(2, n + 1))
    (output,) = graph.program.nodes[-1].all_input_nodes
    moments = Propagation(Weights.of(graph, model)).of(output)
    assert moments is not None
    wanted = (torch.eye(n) - 1 / n).double() / (1 - 1 / n)
    torch.testing.assert_close(moments.covariance, wanted, atol=1e-5, rtol=0)
    assert not moments.mean.any()


class Heads(nn.Module):
    """Attention of two heads, whose output projection is told the places of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batches, samples", [(1, 8), (5, 40)])
def test_covariances_of_few_samples_count_in_part(batches, samples):
    """Of n samples of p places the part n / (n + 2 p) of covariances counts; variances in whole."""
    torch.manual_seed(0)
    model = Heads().eval()
    data = [torch.randn(2, 4, 6) for _ in range(batches)]
    seen: list[Tensor] = []
    hook = model.out.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for x in data:
        model(x)
    hook.remove()
    graph = trace(model, data[0])
    weights = Weights.of(graph, model)
    group = next(g for g in graph.groups if any(s.layer == "out" for s in g.readers))
    reading = Calibration(model, data).readings(group, weights, places=True)["out.weight"]
    true = torch.cat(seen).double().T.cov(correction=0)
    part = samples / (samples + 2 * 6)
    wanted = part * true + (1 - part) * true.diagonal().diag()
    assert part < 0.8
    for matrix in (reading.old, reading.new, reading.cross):
        torch.testing.assert_close(matrix, wanted, atol=1e-5, rtol=1e-4)


# --- methods --------------------------------------------------------------------------------


def test_auto_gives_way_to_what_is_better_by_a_tenth_and_to_nothing_else():
    usual, kept, changed = "moment, folding", 0, 0
    for seed in range(3):
        model, x = build("conv1d", seed)
        for share in (0.1, 0.3, 0.7):
            plan = intrafuse.plan(model, x, channels=share, method="auto")
            for note in plan.notes.values():
                predicted = note["predicted"]
                if not predicted:
                    continue
                best = min(predicted, key=lambda title: predicted[title])
                ratio = predicted[best] / predicted[usual] if predicted[usual] else 1.0
                if ratio < 0.899:
                    assert predicted[note["chosen"]] == predicted[best]  # there may be ties
                    changed += 1
                elif 0.901 < ratio < 0.999:
                    assert note["chosen"] == usual
                    kept += 1
    assert kept and changed  # both happen here


def test_a_projected_channel_gives_nothing_to_its_opposite():
    """Cosines 0.6 and -1: the reader gets 0.6 of one mass, and nothing of the other."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    method = IntraFusion(normalisation="projected")
    for parts, wanted in (([7.0, 0.0], 0.0), ([0.0, 7.0], 0.6 * 7)):
        model[2].weight.data = torch.tensor([[1.0, *parts]])
        plan = intrafuse.plan(model, torch.ones(1, 2), channels=0.66, method=method)
        assert plan.widths == {"0": 1}
        found = plan.apply(model).state_dict()["2.weight"]
        torch.testing.assert_close(found, torch.tensor([[1 + wanted]]))


# --- fusing ---------------------------------------------------------------------------------


class TwoSides(nn.Module):
    """Two layers write the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4, False), nn.Linear(4, 4, False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(x))


@pytest.mark.parametrize("solver", ["ot", "assignment"])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3])
def test_every_side_counts_alike_in_an_alignment(solver, size):
    """Large weights that differ little from channel to channel do not outvote small ones."""
    torch.manual_seed(0)
    one, other = TwoSides(), TwoSides()
    right, wrong = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 3, 0])
    with torch.no_grad():
        one.a.weight.copy_(torch.eye(4))
        one.b.weight.copy_(size * (1 + 0.1 * torch.randn(4, 4)))
        one.head.weight.fill_(1.0)
        other.a.weight.copy_(one.a.weight[right])
        other.b.weight.copy_(one.b.weight[wrong])
        other.head.weight.fill_(1.0)
    weights = [Weights.of(trace(model, torch.zeros(2, 4)), model) for model in (one, other)]
    (step,) = align(weights[0], weights[1], solver=solver).maps.values()
    torch.testing.assert_close(step.encode, torch.eye(4)[right].T)


@pytest.mark.parametrize("angle, spread", [(0.0, 1.0), (60.0, 0.75**0.5), (90.0, 0.5**0.5),
                                           (180.0, 0.5**0.5)])  # fmt: skip
def test_restored_spread_follows_the_cosine_of_the_weights(angle, spread):
    """Halves of two outputs of spread s have spread s sqrt((1 + cos) / 2); opposites as none."""
    turn = torch.tensor(angle).deg2rad()
    members = []
    for row in ([1.0, 0.0], [float(turn.cos()), float(turn.sin())]):
        model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, eps=0.0), nn.Linear(1, 2)).eval()
        model[0].weight.data = torch.tensor([row])
        weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
        fold_norms(weights)
        members.append(Member(model, weights, (), 0.5))
    fused = members[0].weights.snapshot()
    fused.put({"0.weight": torch.tensor([[1.0, 0.0]])})
    analytic_restore(fused, members, rescale=False)
    torch.testing.assert_close(fused.statistics["0.weight"][1], torch.tensor([spread]))
    analytic_restore(fused, members)
    torch.testing.assert_close(fused.state["0.weight"], torch.tensor([[1 / spread, 0.0]]))
    torch.testing.assert_close(fused.statistics["0.weight"][1], torch.ones(1))


# --- merge maps and budgets -----------------------------------------------------------------


def test_carriers_get_the_mean_weighted_by_what_counts_whatever_its_sign():
    """Of P = (0.5, -1.5, 0) the first counts a quarter; a row of zeros gives nothing."""
    step = MergeMap.linear("0", torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(step.carry, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]))
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    model[1].weight.data = torch.tensor([8.0, 4.0, 1.0])
    model[1].running_var = torch.tensor([4.0, 16.0, 1.0])
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    weights.merge(step)
    assert weights.state["1.weight"].tolist() == [5.0, 0.0]
    assert weights.state["1.running_var"].tolist() == [13.0, 0.0]


def test_a_budget_of_nothing_removes_nothing_though_the_first_steps_would_cost_more():
    """Folding adds biases: 7 of 8 channels have more parameters than all, and 2 have as many."""
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    graph = trace(model, torch.zeros(2, 2))

    def amount(widths: Mapping[str, int]) -> float:
        gone = 8 - widths.get("0", 8)
        return 130 - 5 * gone if gone else 100

    for share, width in ((0.0, 8), (0.04, 1)):
        budget = Budget(kind="params", share=share)
        assert choose_widths(graph, [*graph.groups], {}, budget, amount) == {"0": width}


# --- numbers in the code --------------------------------------------------------------------


class Divided(nn.Module):
    def __init__(self, width: int, constant: bool = False) -> None:
        super().__init__()
        self.layer, self.constant = nn.Linear(3, width), constant

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * (0.5 if self.constant else y.shape[-1] ** -0.5)


def difference(new: nn.Module, scales: float | None) -> object:
    """Compare a network of width 4 with another of width 9, as a trial of the code does."""
    x = torch.zeros(2, 3)
    old, now = ([*export_program(m, x).graph.nodes] for m in (Divided(4), new))
    values = {node: [0, 1] for node in calls(old)}
    times = {} if scales is None else {calls(old)[-1]: (1, scales)}
    expected = Expected(old, values, times, {}, {0: 2, 1: 4})
    return first_difference(expected, now, {0: 2, 1: 9})


def test_numbers_that_follow_a_size_are_told_from_others():
    """The root of 4 becomes the root of 9: 1/2 becomes 1/3, no other number."""
    assert difference(Divided(9), -0.5) is None
    for scales in (None, 0.5, -1.0):
        found = difference(Divided(9), scales)
        assert found is not None and found.numbers == pytest.approx((1 / 3,))  # type: ignore
    assert difference(Divided(9, constant=True), None) is None
    found = difference(Divided(9, constant=True), -0.5)
    assert found is not None and found.numbers == (0.5,)  # type: ignore
