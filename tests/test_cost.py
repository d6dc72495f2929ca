"""What a network costs: counts by hand, latency in order, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafuse.errors import IntrafuseError
from intrafuse.evaluate.cost import cost, latency


def test_counts_by_hand():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    found = cost(net, torch.zeros(1, 4), runs=4)
    assert found.params == 4 * 8 + 8 + 16 + 8 * 2 + 2
    assert found.bytes == 4 * (found.params + 16) + 8  # running statistics, and a counter
    assert found.macs == 4 * 8 + 8 * 2
    assert found.peak is None and net.training


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
