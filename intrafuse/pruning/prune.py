"""Plan and prune one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Unpack

from torch import nn

from intrafuse.allocation.budget import Figures, choose_widths, measure
from intrafuse.allocation.latency import LatencyModel
from intrafuse.allocation.patterns import choose_groups
from intrafuse.allocation.timing import latencies
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.importance.metrics import score
from intrafuse.moments.damage import damage_by_width
from intrafuse.moments.synthetic import synthesise
from intrafuse.pruning.each_group import merge_groups
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.repair import reestimate_batchnorm
from intrafuse.pruning.result import Pruned, Report
from intrafuse.pruning.settings import Arguments, Settings, name_of, takes_settings
from intrafuse.pruning.verification.proof import check as prove
from intrafuse.support.arguments import check_arguments
from intrafuse.support.batches import require_rereadable
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = ["Pruned", "Report", "plan", "prune"]

OBSERVED = 6  # most networks to time while choosing widths for a latency budget
AFTER = ("batchnorm", "synthetic")  # repairs that run after surgery


@takes_settings
@apart
def plan(
    model: nn.Module,
    example_inputs: ExampleInputs | ChannelGraph,
    settings: Settings | None = None,
    *,
    data: Iterable | None = None,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Unpack[Arguments],
) -> Plan:
    """Plan the change of each channel group without changing the model.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs to trace it with; or the
            graph that `trace` made of it, to make several plans of one trace.
        settings: how to prune.
        data: batches of inputs or of (inputs, labels), for metrics and methods that need data.
        progress: called with (groups done, all groups). If a method makes synthetic inputs, it is
            first called with (steps done, all steps).
        arguments: fields of `Settings`; they override those of `settings`.

    Returns:
        The plan, to print, save or apply.

    Raises:
        IntrafuseError: see the table of errors in the documentation.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan(net, torch.zeros(1, 4), channels=0.5).widths
    {'0': 4}
    """
    started = time.perf_counter()
    asked = Settings.of(settings, arguments)
    check_arguments(progress=progress)
    require_rereadable(data)
    if asked.repair in AFTER:
        raise IntrafuseError(
            "repair of a plan must be analytic or None",
            value=asked.repair,
            usage=True,
            remedy="call intrafuse.prune, which repairs batch norm",
        )
    method = asked.compression
    graph = example_inputs
    if not isinstance(graph, ChannelGraph):
        graph = trace(model, graph, include=asked.include or ())
    example_inputs = graph.program.example_inputs
    groups = choose_groups(graph, asked.include, asked.exclude)
    weights = Weights.of(graph, model)
    before = measure(graph, graph.sizes, weights.counted())
    if method.folds_batchnorm:
        fold_norms(weights)
    context = Context(
        weights, weights.snapshot(), model, example_inputs, data, int(asked.seed), progress
    )
    scores = {group.name: score(group, context, asked.importance) for group in groups}
    widths, predicted = _choose(asked, groups, scores, context, before)
    maps, solved = merge_groups(method, groups, scores, widths, context, repair=asked.repair)
    after = measure(graph, weights.sizes, weights.counted()) if maps else before
    fold = method.folds_batchnorm and bool(maps)
    described = {**_describe(asked), "latency": predicted}
    return Plan(graph, maps, fold, described, before, after, time.perf_counter() - started, solved)


@takes_settings
@apart
def prune(
    model: nn.Module,
    example_inputs: ExampleInputs | ChannelGraph,
    settings: Settings | None = None,
    *,
    data: Iterable | None = None,
    inplace: bool = False,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Unpack[Arguments],
) -> Pruned:
    """Make a network smaller: plan, apply, repair and check.

    Args:
        model, example_inputs, settings, data, progress, arguments: as for `plan`.
        inplace: change `model` itself; by default it does not change.
        check: run the result. Also select channels of the same widths, and compare the outputs
            with those of the original whose other channels are masked. Raise an error if the
            result is wrong.

    Returns:
        The pruned network, its plan and a report.

    Raises:
        IntrafuseError: as for `plan`; also if a repair lacks data, or the check finds the result
            wrong.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, torch.zeros(1, 4), channels=0.5).model[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    started = time.perf_counter()
    asked = Settings.of(settings, arguments)
    check_arguments(inplace=inplace, check=check)
    if asked.repair == "batchnorm" and data is None:
        raise IntrafuseError(
            "repair of batch norm needs unlabeled data",
            usage=True,
            remedy='pass data= (on the command line --data), or repair="synthetic"',
        )
    now = {"repair": None} if asked.repair in AFTER else {}
    made = plan(model, example_inputs, Settings.of(asked, now), data=data, progress=progress)
    example_inputs = made.graph.program.example_inputs
    smaller = made.apply(model)
    proof = prove(model, smaller, made, example_inputs) if check else None
    timed = asked.wanted.kind == "latency"
    took = latencies({"before": model, "after": smaller}, example_inputs) if timed else {}
    if asked.repair == "synthetic":
        data = synthesise(model, example_inputs, seed=int(asked.seed), progress=progress)
    if asked.repair in AFTER:
        assert data is not None
        smaller = reestimate_batchnorm(model, smaller, made, data, inplace=inplace)
    elif inplace:
        smaller = made.apply(model, inplace=True)
    report = Report(
        wanted={asked.wanted.kind: asked.wanted.share},
        reached=made.removed,
        before=made.before,
        after=made.after,
        seconds=time.perf_counter() - started - (proof.seconds if proof else 0.0),
        latency=took,
        notes=made.notes,
        check=proof,
        unclear=made.graph.unclear(made.graph.resized(made.widths)),
    )
    return Pruned(smaller, made, report)


def _choose(
    asked: Settings,
    groups: list[ChannelGroup],
    scores: Mapping[str, Any],
    context: Context,
    before: Figures,
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Choose the widths of groups; for a latency budget, also predict the latency."""
    budget, graph, original = asked.wanted, context.weights.graph, context.original
    predicts = budget.scope == "predicted"
    damage = damage_by_width(groups, _folded(context.weights)) if predicts else None
    choose = partial(choose_widths, graph, groups, scores, budget, damage=damage)
    if budget.kind == "latency":
        assert context.model is not None
        return _settle(choose, LatencyModel(context.model, graph, groups, context.example_inputs))
    return choose(amount=_counting(budget.kind, original, before)), None


def _folded(weights: Weights) -> Weights:
    """Return the tensors with batch norm folded, even if the method does not fold it."""
    if weights.statistics:
        return weights
    copy = weights.snapshot()
    fold_norms(copy)
    return copy


def _counting(kind: str, weights: Weights, before: Figures) -> Callable[[Mapping[str, int]], float]:
    """Return a function from group widths to the size that a budget limits."""
    graph, counted = weights.graph, weights.counted()

    def amount(widths: Mapping[str, int]) -> float:
        shrinks = any(width < graph.by_name[name].size for name, width in widths.items())
        figures = measure(graph, graph.resized(widths), counted) if shrinks else before
        return getattr(figures, kind)

    return amount


def _settle(
    choose: Callable[..., dict[str, int]], timed: LatencyModel
) -> tuple[dict[str, int], dict[str, float]]:
    """Choose widths by predicted latency, time them, and repeat until the widths stay the same.

    Returns:
        The widths, and the predicted latency "before" and "after" in milliseconds.
    """
    widths = choose(amount=timed.milliseconds)
    for _ in range(OBSERVED):
        timed.observe(widths)
        known, widths = widths, choose(amount=timed.milliseconds)
        if widths == known:
            break
    return widths, {"before": timed.milliseconds({}), "after": timed.milliseconds(widths)}


def _describe(asked: Settings) -> dict[str, Any]:
    """Return the settings of a plan as JSON data."""
    importance = asked.importance
    return {
        "method": asked.compression.as_data(),
        "importance": importance if isinstance(importance, str) else name_of(importance),
        "budget": asdict(asked.wanted),
        "include": None if asked.include is None else list(asked.include),
        "exclude": list(asked.exclude),
        "seed": asked.seed,
        "repair": asked.repair,
    }
