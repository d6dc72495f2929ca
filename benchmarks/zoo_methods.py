"""What merging does to an architecture of the zoo: relative output error of each method.

The statistics of batch norm are estimated on random inputs first, so that they fit the weights. A
sample of the groups that go by default, spread over the network and with every kind among them,
loses a share of its channels by each method, without data. The error is the distance of the outputs
from the original's, as a share of their length, on inputs that were not seen before.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from alarm import within
from torch import Tensor, nn

import intrafuse
from intrafuse.allocation.budget import measure
from intrafuse.graph.trace import as_arguments
from intrafuse.importance.metrics import score
from intrafuse.methods import resolve_method
from intrafuse.pruning.each_group import merge_groups
from intrafuse.pruning.plan import Plan
from intrafuse.support.batches import map_tensors, tensors_of
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = ["METHODS", "compare_methods", "findings"]

METHODS = ("select", "intra-fusion", "moment", "auto")
SHARE = 0.25
GROUPS = 2  # of one network, and one of every kind
WIDEST = 512  # channels of a group, where there are such; covariances take minutes beyond
BATCHES = 8  # of random inputs, that statistics are estimated on
WORSE = 1.1  # times the error of select: what moment must not exceed


def compare_methods(
    model: nn.Module, graph: intrafuse.ChannelGraph, inputs: Any, limit: float
) -> dict[str, Any]:
    """Prune a network by every method, as `intrafuse.plan` does, without tracing it anew for each.

    Args:
        model: in evaluation mode; its batch norms are changed.
        graph: its channel graph.
        inputs: what it takes.
        limit: seconds for each method.

    Returns:
        method -> its relative error, or why there is none.
    """
    combined = [group for group in graph.groups if not group.normed]
    groups = sample([group for group in combined if group.size <= WIDEST] or combined)
    if not groups:
        return {}
    estimate(model, inputs)
    unseen = redrawn(inputs, seed=BATCHES + 1)
    before = called(model, unseen)
    found: dict[str, Any] = {}
    for method in METHODS:
        started = time.perf_counter()
        try:
            with within(limit):
                small = pruned(model, graph, groups, method, inputs)
            found[method] = round(error(called(small, unseen), before), 5)
        except TimeoutError:
            found[method] = f"over {limit:g} s"
        except intrafuse.IntrafuseError as refusal:
            found[method] = f"refused: {refusal}"[:300]
        except Exception as crash:
            found[method] = f"crashed: {type(crash).__name__}: {crash}"[:300]
        found[f"{method} seconds"] = round(time.perf_counter() - started, 1)
    return found


def pruned(
    model: nn.Module,
    graph: intrafuse.ChannelGraph,
    groups: list[intrafuse.ChannelGroup],
    name: str,
    inputs: Any,
) -> nn.Module:
    """Remove a share of the channels of some groups."""
    method = resolve_method(name)
    weights = Weights.of(graph, model)
    size = measure(graph, graph.sizes, weights.counted())
    if method.folds_batchnorm:
        fold_norms(weights)
    context = Context(weights, weights.snapshot(), model, inputs)
    scores = {group.name: score(group, context, "l1") for group in groups}
    widths = {group.name: max(1, round(group.size * (1 - SHARE))) for group in groups}
    maps, _ = merge_groups(method, groups, scores, widths, context)
    return Plan(graph, maps, method.folds_batchnorm, {}, size, size).apply(model)


def findings(row: dict[str, Any]) -> list[str]:
    """List what is to be explained in a row: crashes, outputs that are not finite, moment worse."""
    errors = {method: row.get(method) for method in METHODS if method in row}
    found = [f"{k}: {e}" for k, e in errors.items() if isinstance(e, str) and "over" not in e]
    numbers = {k: e for k, e in errors.items() if isinstance(e, int | float)}
    found += [f"{k}: not finite" for k, e in numbers.items() if not math.isfinite(e)]
    select, moment = numbers.get("select"), numbers.get("moment")
    if select is not None and moment is not None and moment > WORSE * select + 1e-6:
        found.append(f"moment: {moment:.3g}, select: {select:.3g}")
    return found


def sample(groups: list[intrafuse.ChannelGroup]) -> list[intrafuse.ChannelGroup]:
    """Choose groups evenly, and one at least of every kind (`#heads`, `#width`)."""
    step = max(1, math.ceil(len(groups) / GROUPS))
    kinds = {g.name.partition("#")[2].partition("#")[0]: g.name for g in reversed(groups)}
    chosen = {*(group.name for group in groups[::step]), *kinds.values()}
    return [group for group in groups if group.name in chosen]


def estimate(model: nn.Module, inputs: Any) -> None:
    """Estimate the statistics of every batch norm on random inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.track_running_stats:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
    for seed in range(BATCHES if norms else 0):
        called(model, redrawn(inputs, seed))
    model.eval()


def redrawn(inputs: Any, seed: int) -> Any:
    """Draw other inputs like these: noise, and numbers up to the largest."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype == torch.bool or tensor.numel() == 0 or int(tensor.max()) < 2:
            return tensor
        return torch.randint(0, int(tensor.max()) + 1, tensor.shape, generator=generator).to(tensor)

    return map_tensors(draw, inputs)


@torch.no_grad()
def called(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_arguments(inputs)
    return [t.double() for t in tensors_of(model(*args, **kwargs)) if t.is_floating_point()]


def error(now: list[Tensor], before: list[Tensor]) -> float:
    """Measure the distance of outputs, as a share of the length of what they should be.

    What a network caches for its next call has other sizes, and is left out.
    """
    pairs = [(x, y) for x, y in zip(now, before, strict=True) if x.shape == y.shape]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return math.sqrt(apart / max(sum(float(y.square().sum()) for _, y in pairs), 1e-30))
