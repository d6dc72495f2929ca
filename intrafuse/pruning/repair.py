"""Restore activation statistics after surgery, with or without data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafuse.graph.groups import ChannelGraph, ChannelGroup, Norm
from intrafuse.graph.trace import ExampleInputs, as_arguments, evaluating, trace
from intrafuse.moments.readout import with_readout
from intrafuse.moments.sources import MomentSource
from intrafuse.pruning.plan import Plan
from intrafuse.support.batches import batches, fitting
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.merged import merged_output
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.walk import measure

__all__ = ["analytic_repair", "reestimate_batchnorm", "traced"]

ADVICE = (
    "check that the batches fit the model; repair of batch norm needs several samples in every "
    "batch, including the last one"
)
FINITE = "find samples on which the network overflows, and leave them out"


def analytic_repair(merge_map: MergeMap, group: ChannelGroup, context: Context) -> MergeMap:
    """Return the map with gains and shifts that restore the readers' outputs, without data.

    The gains and shifts restore mean and variance of every reader's outputs, as predicted by
    analytic moments. A map that already has gains, shifts or readouts is returned unchanged.

    Args:
        merge_map: the map.
        group: its channel group.
        context: holds the tensors before this map is applied.
    """
    if merge_map.gain or merge_map.shift or merge_map.readers:
        return merge_map
    (readings,) = MomentSource().readings_beside(group, [merge_map], context)
    return with_readout(merge_map, readings, context.weights, solve=False)


@apart
def reestimate_batchnorm(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    data: Iterable,
    *,
    inplace: bool = False,
) -> nn.Module:
    """Re-estimate the statistics of batch norm (REPAIR, Jordan et al., arXiv 2211.08403).

    Each norm of the pruned network gets the statistics of its inputs as running statistics. If
    batch norm was folded, the norm's scale and shift become the standard deviation and mean of the
    merged channels in the original network.

    Args:
        original: the network before pruning.
        pruned: the result of `plan.apply(original)`.
        plan: the plan.
        data: batches of inputs, or of (inputs, labels); labels are ignored. The data is
            read twice if batch norm was folded, so it must be a list or a loader, not a generator.
        inplace: put the result into `original` instead of returning `pruned`.

    Raises:
        IntrafuseError: the data holds no batch, or one that is too small; `pruned` then stays
            unchanged.
    """
    norms = {norm.mean: _norm_module(pruned, norm.name) for norm in plan.graph.norms}
    own = [norm.mean for norm in plan.graph.own_norms]
    targets = _targets(original, plan, data) if plan.fold else {}
    before = [copy.deepcopy(norm.state_dict()) for norm in norms.values()]
    try:
        for name in own:
            if name in targets and norms[name].affine:
                mean, variance = targets[name]
                norms[name].weight.data = variance.sqrt().to(norms[name].weight)
                norms[name].bias.data = mean.to(norms[name].bias)
        _estimate(pruned, norms, data)
        for name in own:
            if name in targets and not norms[name].affine:
                _aim(norms[name], *targets[name])
    except BaseException:
        for norm, state in zip(norms.values(), before, strict=True):
            norm.load_state_dict(state)
        raise
    if not inplace:
        return pruned
    state = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    weights = Weights(plan.graph, state, widths=plan.widths)
    return install(original, weights, inplace=True, like=pruned)


def _aim(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Set the statistics of a norm without scale and shift so that its outputs have these."""
    assert norm.running_mean is not None and norm.running_var is not None
    ratio = ((norm.running_var.double() + norm.eps) / variance.clamp_min(1e-12)).sqrt()
    norm.running_mean.copy_(norm.running_mean - mean * ratio)
    norm.running_var.copy_(ratio.square() - norm.eps)


def _norm_module(model: nn.Module, name: str) -> _BatchNorm:
    module = model.get_submodule(name)
    if not isinstance(module, _BatchNorm):
        raise IntrafuseError(
            "repair of batch norm needs modules of torch.nn.BatchNorm",
            layer=name,
            value=type(module).__name__,
        )
    return module


def _estimate(model: nn.Module, norms: Mapping[str, _BatchNorm], data: Iterable) -> None:
    """Average the statistics of all batches in the batch norms."""
    with evaluating(model):  # also restores momentum, and the state of other modules
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        # the modules themselves run: no operator of a trace averages over batches as they do
        for number, batch in enumerate(_inputs(data, model), 1):
            args, kwargs = as_arguments(batch)
            with torch.no_grad(), fitting(f"batch {number} of the data", ADVICE):
                model(*args, **kwargs)
        states = [copy.deepcopy(norm.state_dict()) for norm in norms.values()]
    for (name, norm), state in zip(norms.items(), states, strict=True):
        if not all(t.isfinite().all() for t in state.values()):
            raise IntrafuseError(
                "batch norm statistics must be finite on the data",
                layer=name.rpartition(".")[0],
                remedy=FINITE,
            )
        norm.load_state_dict(state)


def _inputs(data: Iterable, model: nn.Module) -> Iterator[Any]:
    for inputs, _ in batches(data, model, purpose="repair of batch norm"):
        yield inputs


def _targets(original: nn.Module, plan: Plan, data: Iterable) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure mean and variance (channels,) of each norm's output, merged by the plan."""

    def merged(norm: Norm, output: Tensor) -> Tensor:
        tree = plan.graph.axes[norm.mean][0]
        channels = merged_output(plan.graph, plan.maps, tree, norm.layer, output.double())
        return channels.movedim(1, -1).flatten(0, -2)

    weights = Weights.of(traced(plan, original, _inputs(data, original)), original)
    ordered = {norm.mean: partial(merged, norm) for norm in plan.graph.norms}
    sums, _ = measure(original, weights, _inputs(data, original), ordered)
    return {name: (known.mean(), known.variance()) for name, known in sums.items()}


def traced(plan: Plan, original: nn.Module, inputs: Iterable[ExampleInputs]) -> ChannelGraph:
    """Return a plan's graph with operators; a loaded plan has none, so trace the first batch."""
    if plan.graph.traced is not None:
        return plan.graph
    return trace(original, next(iter(inputs)), include=plan.settings.get("include") or ())
