"""Predict how long a network takes at other widths, from a few networks that are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from intrafuse.allocation.timing import latencies
from intrafuse.graph import ExampleInputs
from intrafuse.graph.axes import tree_size
from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["LatencyModel"]

SHARES = (0.25, 0.5, 0.75, 0.9)  # of channels that the timed networks lack, in all groups
RUNS = 15


class LatencyModel:
    """Milliseconds of a call at widths that were not timed.

    A sum of what each kind of work takes (one call, multiply-accumulates, elements of activations
    and of parameters, with factors of 0 or more) gives the trend. Kernels have cliffs: what the
    networks that were timed are off by is interpolated between them, by inverse squared distance.
    Lower quartiles count, which other work on the machine disturbs least.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        example_inputs: ExampleInputs,
    ) -> None:
        """Time a network and some smaller ones in turns, on the device where it is.

        Args:
            model: the network; left as it was.
            graph: its channel graph, as traced.
            groups: the groups that may shrink.
            example_inputs: of a call; their batch counts.
        """
        self.model, self.graph, self.example_inputs = model, graph, example_inputs
        self.work: list[np.ndarray] = []
        self.times: list[float] = []
        candidates = _candidates(groups)
        models = {str(i): _shrunk(model, graph, widths) for i, widths in enumerate(candidates)}
        took = latencies(models, example_inputs, runs=RUNS)
        for name, widths in zip(models, candidates, strict=True):
            self._add(widths, took[name].lower)

    def observe(self, widths: Mapping[str, int]) -> None:
        """Time one network more, in turns with the unpruned one; predictions near it improve."""
        models = {"before": self.model, "after": _shrunk(self.model, self.graph, widths)}
        took = latencies(models, self.example_inputs, runs=RUNS)
        self._add(widths, took["after"].lower / took["before"].lower * self.times[0])

    def milliseconds(self, widths: Mapping[str, int]) -> float:
        """Predict the time of a call at some widths of groups, by name."""
        work = self._work(widths)
        distances = np.square(np.log(self.seen / work)).sum(1)
        nearest = distances.argmin()
        if distances[nearest] < 1e-12:
            return self.times[nearest]
        off = np.average(np.log(self.times / (self.seen @ self.factors)), weights=1 / distances)
        return float(work @ self.factors * np.exp(off))

    def _add(self, widths: Mapping[str, int], time: float) -> None:
        self.work.append(self._work(widths))
        self.times.append(time)
        self.seen = np.array(self.work)
        scale = self.seen.max(0)
        # relative errors count: a small network's milliseconds matter as much as a large one's
        rows = self.seen / scale / np.array(self.times)[:, None]
        factors, _ = nnls(rows, np.ones(len(self.times)))
        self.factors = factors / scale

    def _work(self, widths: Mapping[str, int]) -> np.ndarray:
        sizes = self.graph.resized(widths)
        activations = 0
        for node, trees in self.graph.program.values.items():
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                activations += prod(tree_size(tree, sizes) for tree in trees)
        params = sum(prod(self.graph.shape(name, sizes)) for name in self.graph.axes)
        return np.array([1, self.graph.macs(sizes), activations, params], float).clip(1)


def _candidates(groups: Sequence[ChannelGroup]) -> list[dict[str, int]]:
    """Choose the widths to time: the network, even shares, and its front and its back halved.

    Halves tell apart what early layers take (activations) and late ones (parameters).
    """
    even = [{g.name: max(1, round(g.size * (1 - share))) for g in groups} for share in SHARES]
    middle = len(groups) // 2
    parts = [
        {g.name: max(1, g.size // 2) for g in part} for part in (groups[:middle], groups[middle:])
    ]
    return [{}, *even, *(widths for widths in parts if widths)]


def _shrunk(model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]) -> nn.Module:
    """Build the network at some widths; which channels it keeps does not matter here."""
    weights = Weights.of(graph, model)
    for name, width in widths.items():
        size = graph.by_name[name].size
        if width < size:
            weights.merge(MergeMap.select(name, size, torch.arange(width)))
    return install(model, weights)
