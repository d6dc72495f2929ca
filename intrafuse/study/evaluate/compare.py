"""Prune one network by several methods and amounts, and measure each result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from intrafuse.allocation.budget import Figures, measure
from intrafuse.catalog.data import Images
from intrafuse.graph import ExampleInputs, trace
from intrafuse.methods import Method, resolve_method
from intrafuse.pruning.prune import prune
from intrafuse.pruning.result import Pruned, Report
from intrafuse.pruning.settings import Settings
from intrafuse.study.evaluate.accuracy import accuracy
from intrafuse.surgery.weights import Weights

__all__ = ["Comparison", "Row", "compare"]


@dataclass(frozen=True)
class Row:
    """The result of one method at one amount.

    Attributes:
        method: name of the method.
        channels_removed, params_removed, macs_removed: removed shares, in [0, 1].
        params, macs: size after pruning.
        accuracy: accuracy in percent, without fine-tuning.
        seconds: time for tracing, planning, surgery and repair.
    """

    method: str
    channels_removed: float
    params: int
    params_removed: float
    macs: int
    macs_removed: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The network before pruning, and one row for each amount and method."""

    original: Figures
    accuracy: float
    rows: tuple[Row, ...]

    def as_data(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        original = {**asdict(self.original), "accuracy": self.accuracy}
        return {"original": original, "rows": [asdict(row) for row in self.rows]}


def compare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    test: Images,
    *,
    channels: Sequence[float],
    methods: Sequence[str | Method],
    batch_size: int = 100,
    device: str = "cpu",
    settings: Settings | None = None,
    training: Iterable | None = None,
    keep: Callable[[Row, Pruned], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Prune a network by each method and amount, and measure accuracy without fine-tuning.

    Args:
        model: the trained network; it is not changed.
        example_inputs: inputs to trace the network with.
        test: the images to measure accuracy on.
        channels: shares of channels to remove, each in [0, 1).
        methods: names or methods.
        batch_size, device: for the measurement.
        settings: settings of all prunings, except method and amount.
        training: batches for metrics, methods and repairs that need data.
        keep: called with each row and its pruned network, for example to save it.
        progress: called with (networks done, networks in total), including the unpruned one.

    Raises:
        IntrafuseError: as for `prune` and `accuracy`.

    >>> from intrafuse.catalog.data import load_data
    >>> from intrafuse.catalog.zoo import resolve_model
    >>> net = resolve_model("mlp")
    >>> images = load_data("digits", limit=20)
    >>> found = compare(net.model, net.example_inputs, images, channels=[0.5], methods=["select"])
    >>> found.original.params, found.rows[0].params
    (17226, 6570)
    """
    chosen = [resolve_method(method) for method in methods]  # fail before anything slow
    base = settings or Settings()
    total = 1 + len(channels) * len(chosen)
    report = progress or (lambda done, total: None)
    report(0, total)
    include = base.include or ()
    trace(nn.ReLU(), torch.zeros(1, 1))  # warm up the tracer: its first run loads modules
    started = time.perf_counter()
    graph = trace(model, example_inputs, include=include)
    traced = time.perf_counter() - started
    before = measure(graph, graph.sizes, Weights.of(graph, model).counted())
    unpruned = accuracy(model, test, batch_size=batch_size, device=device)
    report(1, total)
    rows = []
    for share in channels:
        for method in chosen:
            one = Settings.of(base, {"channels": share, "method": method})
            pruned = prune(model, graph, one, data=training)
            measured = accuracy(pruned.model, test, batch_size=batch_size, device=device)
            rows.append(_row(method.name, pruned.report, measured, traced))
            if keep is not None:
                keep(rows[-1], pruned)
            report(1 + len(rows), total)
    return Comparison(before, unpruned, tuple(rows))


def _row(method: str, report: Report, percent: float, traced: float) -> Row:
    after, gone = report.after, report.reached
    return Row(
        method=method,
        channels_removed=gone["channels"],
        params=after.params,
        params_removed=gone["params"],
        macs=after.macs,
        macs_removed=gone["macs"],
        accuracy=percent,
        seconds=traced + report.seconds,
    )
