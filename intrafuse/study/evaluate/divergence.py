"""Measure the distance between a pruned network's and the original's outputs, also by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafuse.catalog.data import Images
from intrafuse.fusing.observe import Point, points
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.trace import evaluating
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.repair import traced
from intrafuse.support.arguments import check_choice
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.merged import merged_output
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.walk import walk

__all__ = ["KINDS", "LayerDivergence", "divergence", "layer_divergence"]

Kind = Literal["logits", "softmax", "cosine"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def divergence(
    original: nn.Module,
    other: nn.Module,
    data: Images,
    *,
    kind: Kind = "logits",
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Measure the distance between two networks' outputs for each image.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 5.1.

    Args:
        original, other: map images (B, C, H, W) to logits (B, classes); they are not changed.
        data: the images; labels are ignored.
        kind: `logits`: L2 distance. `softmax`: L2 distance of class probabilities, at most
            sqrt(2). `cosine`: 1 minus the cosine of the logits, in [0, 2].
        batch_size: images in a batch; the result does not depend on it.
        device: device of both networks.
        progress: called with (images done, images in total).

    Returns:
        float64, (N,), in the order of the images.

    Raises:
        IntrafuseError: the kind is unknown, or outputs are not finite.

    >>> from intrafuse.catalog.data import load_data
    >>> from intrafuse.catalog.zoo import resolve_model
    >>> net = resolve_model("mlp").model
    >>> divergence(net, net, load_data("digits", limit=50)).max().item()
    0.0
    """
    check_choice("kind", kind, Kind)
    found, done = [], 0
    with evaluating(original), evaluating(other), torch.inference_mode():
        for images, _ in data.batches(batch_size, device=device):
            a, b = original(images).double(), other(images).double()
            if kind == "cosine":
                apart = (1 - F.cosine_similarity(a, b)).clamp_min(0)
            elif kind == "softmax":
                apart = (a.softmax(1) - b.softmax(1)).norm(dim=1)
            else:
                apart = (a - b).norm(dim=1)
            if not apart.isfinite().all():
                raise IntrafuseError("a network returns numbers that are not finite")
            found.append(apart.cpu())
            done += len(images)
            if progress is not None:
                progress(done, len(data))
    return torch.cat(found)


@dataclass(frozen=True)
class LayerDivergence:
    """The distance between a layer's outputs and the merged outputs of the original.

    Attributes:
        layer: path of the module; the path of the norm if one follows the layer; the name of the
            weight if a function reads it.
        error: squared distance divided by the variance of the original's outputs within batches.
            0 means equal, 1 means no better than their mean.
        variance_ratio: variance of the pruned network's outputs divided by that of the original's.
    """

    layer: str
    error: float
    variance_ratio: float


@apart
def layer_divergence(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    data: Images,
    *,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
) -> list[LayerDivergence]:
    """Measure the damage of a pruning layer by layer.

    Args:
        original: the network before pruning.
        pruned: the result of `plan.apply(original)`, perhaps repaired or fine-tuned.
        plan: the plan.
        data: the images; labels are ignored.
        batch_size: images in a batch.
        device: device of both networks.

    Returns:
        One entry for each layer with observable outputs, from input to output.

    Raises:
        IntrafuseError: `pruned` lacks tensors of the original.
    """
    sums: dict[str, Tensor] = {}

    def compare(point: Point, was: Tensor, now: Tensor) -> None:
        was, now = (output.movedim(point.axis, 1) for output in (was, now))
        merged = merged_output(plan.graph, plan.maps, point.tree, point.weight, was).double()
        terms = _terms(merged, now.double()).cpu()
        sums[point.name] = sums.get(point.name, 0) + terms

    def images() -> Iterator[Tensor]:
        return (batch for batch, _ in data.batches(batch_size, device=device))

    graph = traced(plan, original, images())
    state = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    networks = Weights.of(graph, original), Weights(graph, state, widths=plan.widths)
    missing = sorted((networks[0].state.keys() & graph.axes) - networks[1].state.keys())
    if missing:
        raise IntrafuseError(
            "the pruned network lacks tensors of the original",
            value=missing,
            remedy="pass the result of plan.apply(original), its norms not removed",
        )
    seen = {point.key: partial(compare, point) for point in _points(plan.graph)}
    walk(original, networks, images(), seen)
    return [LayerDivergence(name, *_ratios(total)) for name, total in sums.items()]


def _points(graph: ChannelGraph) -> list[Point]:
    """List norms that follow a layer, and layers without such a norm, in order of execution."""
    normed = {norm.layer: norm for norm in graph.norms if norm.layer is not None}
    found = []
    for point in points(graph):
        norm = normed.get(point.weight)
        if norm is not None:
            point = replace(point, name=norm.name, axis=1, key=norm.mean)
        found.append(point)
    return found


def _terms(a: Tensor, b: Tensor) -> Tensor:
    """Compute the terms of the ratios: squared distance and both sums of squared deviations."""
    rows = torch.stack([x.transpose(0, 1).flatten(1) for x in (a, b)])
    variances = rows.var(2, correction=0).sum(1) * rows.shape[2]
    apart = (rows[0] - rows[1]).square().sum()
    return torch.stack([apart, *variances])


def _ratios(total: Tensor) -> tuple[float, float]:
    apart, first, second = total.tolist()
    return apart / max(first, 1e-300), second / max(first, 1e-300)
