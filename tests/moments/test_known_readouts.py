"""Readouts and what enters them, each number by hand: ridge, gain, shift, rest, shares, floors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intrafuse.graph import trace
from intrafuse.moments.damage import stream_shares
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import Reading, readings
from intrafuse.moments.readout import read_back
from intrafuse.surgery.weights import Weights


def double(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.double)


def reading(cross: Tensor, new: Tensor, rest: float = 0.0, rest_mean: float = 0.0) -> Reading:
    """Old channels of variance 1 and mean 5, new ones of mean 1; the reader doubles them."""
    n, m = cross.shape
    taps = 2 * torch.eye(n).double()[:, :, None]
    kernel, old = double([1.0]), torch.eye(n).double()
    means = torch.full((n,), 5.0).double(), torch.ones(m).double()
    others = torch.full((n,), rest).double(), torch.full((n,), rest_mean).double()
    return Reading("reader", taps, kernel, means[0], old, means[1], new, cross, *others)


@pytest.mark.parametrize(("ridge", "diagonal"), [(0.5, [1 / 2, 3 / 4]), (0.0, [1.0, 1.0])])
def test_the_ridge_is_in_units_of_the_mean_variance(ridge, diagonal):
    """Of variances 1 and 3 the mean is 2: a ridge of a half adds 1 to both."""
    both = double(1.0, 3.0).diag()
    matrix, _, _ = read_back(reading(both, both), ridge=ridge)
    torch.testing.assert_close(matrix, double(*diagonal).diag(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("most", "gain"), [(3.0, 3.0), (100.0, 10.0), (9.99, 9.99), (0.0, 1.0)])
def test_a_gain_restores_the_spread_up_to_the_largest(most, gain):
    """A tenth of the old activation is read back: ten times that has the old spread."""
    known = reading(double([0.1]), double([1.0]))
    matrix, found, shift = read_back(known, ridge=0.0, max_gain=most)
    torch.testing.assert_close(matrix, double([0.1]), atol=1e-8, rtol=0)
    torch.testing.assert_close(found, double(gain), atol=1e-6, rtol=0)
    torch.testing.assert_close(shift, double(2 * 5 - gain * 2 * 0.1), atol=1e-6, rtol=0)


def test_what_is_read_elsewhere_has_its_part_in_gain_and_shift():
    """Variance 4 + 5 becomes 0.04 + 5; the mean 10 + 7 becomes 0.2 + 7."""
    known = reading(double([0.1]), double([1.0]), rest=5.0, rest_mean=7.0)
    _, gain, shift = read_back(known, ridge=0.0)
    times = (9 / 5.04) ** 0.5
    torch.testing.assert_close(gain, double(times), atol=1e-6, rtol=0)
    torch.testing.assert_close(shift, double(17 - times * 7.2), atol=1e-6, rtol=0)


class Beside(nn.Module):
    """The head reads two groups side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(3, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
            self.a.bias.copy_(torch.tensor([3.0, -1.0]))
            self.b.weight.copy_(torch.tensor([[4.0, 0.0]]))
            self.b.bias.fill_(6.0)
            self.head.weight.copy_(torch.tensor([[7.0, 8.0, 5.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


def test_a_reader_of_two_groups_knows_what_it_reads_of_the_other():
    """The other group has mean 6 and variance 16, and is read five times."""
    model = Beside()
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    found = readings(weights.graph.by_name["a"], Propagation(weights))["head.weight"]
    assert (found.rest.item(), found.rest_mean.item()) == (25 * 16, 5 * 6)
    assert found.old_mean.tolist() == [3.0, -1.0] and found.taps.flatten().tolist() == [7.0, 8.0]


class Blocks(nn.Module):
    """Two layers add to what the first one writes, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.enter.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
            self.one.weight.copy_(torch.tensor([[2.0, 3.0], [1.0, 0.0]]))
            self.two.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enter(x) + self.one(x) + self.two(x))


def test_each_layer_has_its_share_of_the_stream_that_it_adds_to():
    """Variances 34, 14 and 2 are 34 of 34, 14 of 48 and 2 of 50."""
    model = Blocks()
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    found = stream_shares(Propagation(weights))
    assert found.pop("head.weight") == 1.0
    expected = {"enter.weight": 1.0, "one.weight": 14 / 48, "two.weight": 2 / 50}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_layer_norm_of_channels_that_are_all_the_same_leaves_nothing(eps):
    """What rounding leaves of their difference is no spread that the norm could blow up."""
    layer, n = nn.Linear(3, 7, bias=False), 7
    model = nn.Sequential(layer, nn.LayerNorm(n, eps=eps))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.1, 0.7, 1 / 3]).expand(n, 3))
    weights = Weights.of(trace(model, torch.zeros(2, 3)), model)
    propagation = Propagation(weights)
    (output,) = weights.graph.program.nodes[-1].all_input_nodes
    before = propagation.of(output.args[0])
    assert before is not None
    before.covariance[0, 1] += 1e-15  # rounding of a sum in another order
    found = propagation.of(output)
    assert found is not None and not found.covariance.any()
