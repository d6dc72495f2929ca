"""Predict the latency of a network at other widths from a few timed networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from intrafuse.allocation.timing import latencies
from intrafuse.graph import ExampleInputs
from intrafuse.graph.axes import tree_size
from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["LatencyModel"]

SHARES = (0.25, 0.5, 0.75, 0.9)  # removed shares of channels in the timed networks
RUNS = 15


class LatencyModel:
    """Predictor of the milliseconds of one call at any widths.

    The trend is a sum over kinds of work (one call, multiply-accumulates, elements of activations,
    elements of parameters) with nonnegative factors. Kernel times also jump between sizes. So the
    ratio of measured time to trend is interpolated between the timed networks, weighted by inverse
    squared distance. Times are lower quartiles, which other work on the machine disturbs least.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        example_inputs: ExampleInputs,
    ) -> None:
        """Time a network and some smaller ones in turns, on the network's device.

        Args:
            model: the network; it is not changed.
            graph: its channel graph, with the traced operators.
            groups: the groups that may shrink.
            example_inputs: the inputs of a timed call, including their batch size.
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
        """Time one more network, in turns with the original, to improve predictions near it."""
        models = {"before": self.model, "after": _shrunk(self.model, self.graph, widths)}
        took = latencies(models, self.example_inputs, runs=RUNS)
        self._add(widths, took["after"].lower / took["before"].lower * self.times[0])

    def milliseconds(self, widths: Mapping[str, int]) -> float:
        """Predict the milliseconds of a call at the given widths by group name."""
        work = self._work(widths)
        distances = np.square(np.log(self.seen / work)).sum(1)
        nearest = distances.argmin()
        if distances[nearest] < 1e-12:
            return self.times[nearest]
        off = np.average(np.log(self.times / (self.seen @ self.factors)), weights=1 / distances)
        return float(work @ self.factors * np.exp(off))

    def _add(self, widths: Mapping[str, int], time: float) -> None:
        from scipy.optimize import nnls  # slow to import

        self.work.append(self._work(widths))
        self.times.append(time)
        self.seen = np.array(self.work)
        scale = self.seen.max(0)
        # fit relative errors, so that small networks count as much as large ones
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
    """Choose the widths to time: the network, even shares, and halved front or back groups.

    These separate the cost of early layers (activations) from that of late layers (parameters).
    """
    even = [{g.name: max(1, round(g.size * (1 - share))) for g in groups} for share in SHARES]
    middle = len(groups) // 2
    parts = [
        {g.name: max(1, g.size // 2) for g in part} for part in (groups[:middle], groups[middle:])
    ]
    return [{}, *even, *(widths for widths in parts if widths)]


def _shrunk(model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]) -> nn.Module:
    """Build the network at the given widths, with arbitrary channels."""
    weights = Weights.of(graph, model)
    for name, width in widths.items():
        size = graph.by_name[name].size
        if width < size:
            weights.merge(MergeMap.select(name, size, torch.arange(width)))
    return install(model, weights)
