"""Prune one network by several methods and amounts, and measure how far the outputs go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from intrafuse.catalog.data import Images
from intrafuse.graph import ExampleInputs
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
FAR = 99.5  # percentile of the histograms' upper end, beyond which everything is one bin


@dataclass(frozen=True)
class DivergenceRow:
    """How far one pruned network's outputs are from the original's.

    Attributes:
        method: its name.
        channels_removed: the share that went, in [0, 1].
        mean, quartiles: over the images.
        edges: bounds of the histogram's bins, the same for all methods at one amount; the last is
            the largest value.
        counts: images in each bin.
        layers: where the damage starts, from input to output; empty where it was not asked for.
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
        images: how many were measured.
        rows: one for each amount and method.
    """

    measure: str
    images: int
    rows: tuple[DivergenceRow, ...]

    def as_data(self) -> dict[str, Any]:
        """Give the figures as JSON data."""
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
    """Measure how far pruned networks' outputs are from the original's, by method and amount.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 5.1 and figure 5.

    Args:
        model: the trained network; it is not changed.
        example_inputs: what it is traced with.
        data: the images; labels are ignored.
        channels: shares of channels to remove, each in [0, 1).
        methods: names or methods.
        kind: logits, softmax or cosine, as for `divergence`.
        layers: also measure layer by layer.
        batch_size, device: of the measurement.
        settings: of all prunings, but for method and amount.
        training: batches for metrics, methods and repairs that need data.
        prune: `intrafuse.prune`, or what gives networks that were pruned before.
        progress: called with (networks done, networks in all).

    Raises:
        IntrafuseError: as for `prune` and `divergence`.
    """
    check_choice("kind", kind, Kind)
    chosen = [resolve_method(method) for method in methods]
    advance = progress or (lambda done, total: None)
    common: Any = {"batch_size": batch_size, "device": device}
    base = settings or Settings()
    total = len(channels) * len(chosen)
    rows: list[DivergenceRow] = []
    advance(0, total)
    for share in channels:
        found = []
        for method in chosen:
            one = Settings.of(base, {"channels": share, "method": method})
            pruned = prune(model, example_inputs, one, data=training)
            values = divergence(model, pruned.model, data, kind=kind, **common).numpy()
            inner = (
                layer_divergence(model, pruned.model, pruned.plan, data, **common) if layers else ()
            )
            found.append((method.name, pruned.report.reached["channels"], values, tuple(inner)))
            advance(len(rows) + len(found), total)
        edges = _edges([values for _, _, values, _ in found])
        rows += [_row(edges, *one) for one in found]
    return Divergences(kind, len(data), tuple(rows))


def _edges(found: Sequence[np.ndarray]) -> np.ndarray:
    """Choose bins that all rows share: even ones up to where nearly all lie, and one beyond."""
    values = np.concatenate(found) if found else np.zeros(1)
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
