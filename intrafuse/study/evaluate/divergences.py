"""Prune one network by several methods and amounts, and measure the divergence of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from intrafuse.catalog.data import Images
from intrafuse.graph import ExampleInputs, trace
from intrafuse.methods import Method, resolve_method
from intrafuse.pruning.prune import prune
from intrafuse.pruning.result import Pruned
from intrafuse.pruning.settings import Settings
from intrafuse.study.evaluate.divergence import (
    Kind,
    LayerDivergence,
    divergence,
    layer_divergence,
)
from intrafuse.support.arguments import check_choice

__all__ = ["DivergenceRow", "Divergences", "divergences"]

BINS = 40
FAR = 99.5  # percentile where the equal bins of a histogram end; one bin holds the rest


@dataclass(frozen=True)
class DivergenceRow:
    """The distance of one pruned network's outputs from the original's.

    Attributes:
        method: name of the method.
        channels_removed: the removed share, in [0, 1].
        mean, quartiles: statistics over the images.
        edges: bounds of the histogram's bins, equal for all methods at one amount. The last bound
            is the largest value.
        counts: number of images in each bin.
        layers: divergence by layer, from input to output; empty if not requested.
    """

    method: str
    channels_removed: float
    mean: float
    quartiles: tuple[float, float, float]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    layers: tuple[LayerDivergence, ...]


@dataclass(frozen=True)
class Divergences:
    """Divergences by method and amount.

    Attributes:
        measure: logits, softmax or cosine.
        images: number of images.
        rows: one row for each amount and method.
    """

    measure: str
    images: int
    rows: tuple[DivergenceRow, ...]

    def as_data(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)


def divergences(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Images,
    *,
    channels: Sequence[float],
    methods: Sequence[str | Method],
    kind: Kind = "logits",
    layers: bool = False,
    batch_size: int = 100,
    device: str = "cpu",
    settings: Settings | None = None,
    training: Iterable | None = None,
    prune: Callable[..., Pruned] = prune,
    progress: Callable[[int, int], None] | None = None,
) -> Divergences:
    """Measure the distance of pruned networks' outputs from the original's, by method and amount.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 5.1 and figure 5.

    Args:
        model: the trained network; it is not changed.
        example_inputs: inputs to trace the network with.
        data: the images; labels are ignored.
        channels: shares of channels to remove, each in [0, 1).
        methods: names or methods.
        kind: logits, softmax or cosine, as for `divergence`.
        layers: True to measure layer by layer, too.
        batch_size, device: for the measurement.
        settings: settings of all prunings, except method and amount.
        training: batches for metrics, methods and repairs that need data.
        prune: `intrafuse.prune`, or a function that returns saved pruned networks instead; it gets
            the graph of the model in place of example inputs.
        progress: called with (networks done, networks in total).

    Raises:
        IntrafuseError: as for `prune` and `divergence`.
    """
    check_choice("kind", kind, Kind)
    chosen = [resolve_method(method) for method in methods]
    advance = progress or (lambda done, total: None)
    common: Any = {"batch_size": batch_size, "device": device}
    base = settings or Settings()
    graph = trace(model, example_inputs, include=base.include or ())
    total = len(channels) * len(chosen)
    rows: list[DivergenceRow] = []
    advance(0, total)
    for share in channels:
        measured = []
        for method in chosen:
            one = Settings.of(base, {"channels": share, "method": method})
            pruned = prune(model, graph, one, data=training)
            values = divergence(model, pruned.model, data, kind=kind, **common).numpy()
            inner = (
                layer_divergence(model, pruned.model, pruned.plan, data, **common) if layers else ()
            )
            measured.append((method.name, pruned.report.reached["channels"], values, tuple(inner)))
            advance(len(rows) + len(measured), total)
        edges = _edges([values for _, _, values, _ in measured])
        rows += [_row(edges, *one) for one in measured]
    return Divergences(kind, len(data), tuple(rows))


def _edges(measured: Sequence[np.ndarray]) -> np.ndarray:
    """Choose common bins for all rows: equal bins up to the percentile FAR, and one beyond."""
    values = np.concatenate(measured) if measured else np.zeros(1)
    top = max(float(np.percentile(values, FAR)), 1e-12)
    return np.append(np.linspace(0, top, BINS), max(float(values.max()), top * (1 + 1e-9)))


def _row(
    edges: np.ndarray,
    method: str,
    removed: float,
    values: np.ndarray,
    layers: tuple[LayerDivergence, ...],
) -> DivergenceRow:
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    counts = tuple(np.histogram(values, edges)[0].tolist())
    mean, bounds = float(values.mean()), tuple(edges.tolist())
    return DivergenceRow(method, removed, mean, (low, middle, high), bounds, counts, layers)
