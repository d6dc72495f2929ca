"""Plan and prune one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Unpack

from torch import nn

from intrafuse.allocation.budget import measure
from intrafuse.allocation.timing import latencies
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.groups import ChannelGraph
from intrafuse.moments.synthetic import synthesise
from intrafuse.pruning.each_group import merge_groups
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.prepare import describe, prepare
from intrafuse.pruning.repair import reestimate_batchnorm
from intrafuse.pruning.result import Pruned, Report
from intrafuse.pruning.settings import Arguments, Settings, takes_settings
from intrafuse.pruning.verification.proof import check as prove
from intrafuse.support.arguments import check_arguments
from intrafuse.support.batches import require_rereadable
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.weights import Weights

__all__ = ["Pruned", "Report", "plan", "prune"]

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
    weights = Weights.of(graph, model)
    ready = prepare(asked, weights, model, data=data, progress=progress)
    scores = ready.scores()
    widths, predicted = ready.widths(scores)
    maps, solved = merge_groups(
        method, ready.groups, scores, widths, ready.context, repair=asked.repair
    )
    before = ready.before
    after = measure(graph, weights.sizes, weights.counted()) if maps else before
    fold = method.folds_batchnorm and bool(maps)
    described = {**describe(asked), "latency": predicted}
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
