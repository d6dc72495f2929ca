"""Restoring what averaging takes: gains, floors and statistics against known answers."""

from __future__ import annotations

import torch
from torch import nn

from intrafuse.fusing.members import Member
from intrafuse.fusing.restore import FLOOR, analytic_restore, reestimate
from intrafuse.graph import trace
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights


def network(*rows: list[float]) -> tuple[nn.Module, Weights]:
    """Outputs of mean 3 and spread 2, as the norm says, and a head."""
    n = len(rows)
    model = nn.Sequential(nn.Linear(2, n), nn.BatchNorm1d(n, eps=0.0), nn.ReLU(), nn.Linear(n, 1))
    model.eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows))
        model[0].bias.zero_()
        model[1].weight.fill_(2.0)
        model[1].bias.fill_(3.0)
    weights = Weights.of(trace(model, torch.zeros(2, 2)), model)
    fold_norms(weights)
    return model, weights


def samples() -> torch.Tensor:
    """Inputs of mean 0, variance 1 and no correlation."""
    return torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def test_outputs_get_the_mean_of_the_networks_means_and_spreads():
    """Deviations 2 and 6, and means 3 and 7, of two networks count 1/4 and 3/4."""
    members = []
    for share, row, mean in ((0.25, [1.0, 0.0], 3.0), (0.75, [0.0, 3.0], 7.0)):
        model, weights = network(row, row)
        weights.put({"0.bias": torch.full((2,), mean)})
        members.append(Member(model, weights, (), share))
    model, fused = network([0.5, 0.5], [0.0, 1.0])
    reestimate(model, fused, members, [samples()])
    with torch.no_grad():
        z = install(model, fused)[0](samples())
    torch.testing.assert_close(z.std(0, correction=0), torch.full((2,), 5.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(z.mean(0), torch.full((2,), 6.0))


def test_an_output_of_hardly_any_spread_is_not_blown_up():
    """Its variance counts as 1e-5 of the mean one at least; none at all stays none."""
    rows = [[1.0, 0.0], [1e-6, 0.0], [0.0, 0.0]]
    members = [Member(*network(*([[1.0, 0.0]] * 3)), (), 1.0)]
    model, fused = network(*rows)
    before = fused.state["0.weight"].clone()
    reestimate(model, fused, members, [samples()])
    gain = (fused.state["0.weight"] / before)[:2, 0].double()
    variance = torch.tensor([4.0, 4e-12, 0.0]).double()
    floor = FLOOR * variance.mean()
    torch.testing.assert_close(gain, (2 / (variance + floor).sqrt())[:2], rtol=1e-5, atol=0)
    assert not fused.state["0.weight"][2].any() and fused.state["0.bias"][2] == 3.0


def test_what_is_restored_without_data_has_the_mean_of_the_statistics():
    members = [
        Member(*network(row), (), share) for row, share in (([1.0, 0.0], 0.25), ([0.0, 1.0], 0.75))
    ]
    members[1].weights.note("0.weight", torch.tensor([7.0]), torch.tensor([4.0]))
    fused = members[0].weights.snapshot()
    fused.put({"0.weight": torch.tensor([[0.5, 1.5]]), "0.bias": torch.tensor([6.0])})
    analytic_restore(fused, members)
    collapsed, wanted = (0.5**2 + 3.0**2) ** 0.5, 0.25 * 2 + 0.75 * 4
    gain, mean = wanted / collapsed, 0.25 * 3 + 0.75 * 7
    torch.testing.assert_close(fused.state["0.weight"], gain * torch.tensor([[0.5, 1.5]]))
    torch.testing.assert_close(fused.state["0.bias"], torch.tensor([gain * 6 + (1 - gain) * mean]))
    found = [line.item() for line in fused.statistics["0.weight"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([mean, wanted]))
