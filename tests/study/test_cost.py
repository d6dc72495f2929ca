"""What a network costs: counts by hand, latency in order, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafuse.allocation.timing import latencies, latency
from intrafuse.study.evaluate.cost import cost, costs, costs_record
from intrafuse.study.evaluate.memory import peak_memory
from intrafuse.support.errors import IntrafuseError


def test_counts_by_hand():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    found = cost(net, torch.zeros(1, 4), runs=4)
    assert found.params == 4 * 8 + 8 + 16 + 8 * 2 + 2
    assert found.bytes == 4 * (found.params + 16) + 8  # running statistics, and a counter
    assert found.macs == 4 * 8 + 8 * 2
    assert found.peak == 4 * (8 + 8) and net.training  # the norm's output beside its input


def test_latency_is_ordered_and_says_how_it_was_measured():
    calls = []
    net = nn.Linear(4, 4)
    net.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    found = latency(net, (torch.zeros(2, 4),), runs=9, warm=2)
    assert calls == [True] * 11
    assert 0 < found.lower <= found.median <= found.upper
    assert (found.runs, found.threads, found.device) == (9, torch.get_num_threads(), "cpu")


def test_too_few_runs_have_no_quartiles():
    with pytest.raises(IntrafuseError, match="four runs"):
        latency(nn.Linear(1, 1), torch.zeros(1, 1), runs=3)


def test_a_network_that_cannot_be_traced_has_no_count_of_macs():
    class Odd(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 1 else -x

    assert cost(Odd(), torch.zeros(1, 2), runs=4).macs is None


def test_peak_memory_by_hand():
    """Two tensors of 8 floats live while the third is made; then two go."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)

        def forward(self, x):
            a = self.first(x)
            b = a + a.relu()
            del a
            return b.sum(1)

    assert peak_memory(Net(), torch.zeros(1, 4)) == 4 * 3 * 8
    assert peak_memory(nn.Flatten(), torch.zeros(1, 4)) == 0  # a view of what was given
    inplace = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
    assert peak_memory(inplace, torch.zeros(3, 4)) == 4 * 3 * 8


def test_peak_memory_counts_what_is_shared_once():
    class Net(nn.Module):
        def forward(self, x):
            a = x + 1
            return a, {"view": a.view(-1)[::2]}, torch.eye(2).to_sparse()

    # the sparse tensor itself is not counted, the one that it was made from is
    assert 4 * 8 + 4 * 4 <= peak_memory(Net(), torch.zeros(2, 4)) < 4 * 8 + 4 * 4 + 64


def test_networks_are_timed_in_turns():
    calls = []
    nets = {name: nn.Linear(2, 2) for name in "ab"}
    for name, net in nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    found = latencies(nets, torch.zeros(1, 2), runs=4, warm=1)
    assert calls == ["a", "b"] * 5 and list(found) == ["a", "b"]


def test_costs_of_several_networks_as_a_record():
    nets = {"large": nn.Linear(4, 8), "small": nn.Linear(4, 2)}
    x = torch.zeros(1, 4)
    record = costs_record(costs(nets, x, runs=4), x)
    assert record["inputs"] == [[1, 4]]
    assert [row["network"] for row in record["rows"]] == ["large", "small"]
    assert [row["macs"] for row in record["rows"]] == [32, 8]
    assert [row["peak"] for row in record["rows"]] == [32, 8]
