"""What tests of fusion share: permuted and duplicated copies of networks."""

from __future__ import annotations

import torch
from torch import nn

from intrafuse.graph import trace
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights


def permuted(model: nn.Module, x, seed: int = 0) -> nn.Module:
    """Return a copy whose channels stand in another order, in every group; same function."""
    graph = trace(model, x)
    weights = Weights.of(graph, model)
    generator = torch.Generator().manual_seed(seed)
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        weights.merge(MergeMap.linear(group.name, torch.eye(group.size)[order]))
    return install(model, weights)


def duplicated(model: nn.Module, x, times: int = 2) -> nn.Module:
    """Return a copy that holds every channel several times; same function."""
    graph = trace(model, x)
    weights = Weights.of(graph, model)
    for group in graph.groups:
        encode = torch.eye(group.size).repeat(times, 1)
        weights.merge(MergeMap.linear(group.name, encode, encode.T / times))
    return install(model, weights)
