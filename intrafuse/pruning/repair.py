"""Repair: restore the statistics of activations after surgery, with or without data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafuse.graph.axes import Tree, locate
from intrafuse.graph.blocks import put_channels
from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.trace import evaluating
from intrafuse.moments.readout import with_readout
from intrafuse.moments.sources import MomentSource
from intrafuse.pruning.plan import Plan
from intrafuse.support.batches import batches
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.watch import feed, measure
from intrafuse.surgery.weights import Weights

__all__ = ["analytic_repair", "merged_output", "reestimate_batchnorm"]

ADVICE = (
    "check that the batches fit the model; repair of batch norm needs several samples in every "
    "batch, also in the last one"
)
FINITE = "look for samples on which the network overflows, and leave them out"


def analytic_repair(step: MergeMap, group: ChannelGroup, context: Context) -> MergeMap:
    """Give a map gains and shifts that restore what its readers write, without data.

    Mean and variance of the outputs of every reader become what they were, as far as analytic
    moments tell. A map that brings gains or readouts of its own is returned as it is.

    Args:
        step: the map.
        group: its channel group.
        context: the tensors as merged before it.
    """
    if step.gain or step.shift or step.readers:
        return step
    (found,) = MomentSource().readings_beside(group, [step], context)
    return with_readout(step, found, context.weights, solve=False)


@apart
def reestimate_batchnorm(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    data: Iterable,
    *,
    inplace: bool = False,
) -> nn.Module:
    """Estimate the statistics of batch norm anew (REPAIR, Jordan et al., arXiv 2211.08403).

    Each norm of the pruned network gets the running statistics of what reaches it. Where batch
    norm was folded, its scale and shift become the spread and mean that the merged channels have
    in the original network.

    Args:
        original: the network before pruning.
        pruned: what `plan.apply(original)` gave.
        plan: the plan.
        data: batches of inputs, or of (inputs, labels); labels are ignored. It is read twice
            where batch norm was folded, so it must be a list or a loader, not a generator.
        inplace: put the result into `original` instead of returning `pruned`.

    Raises:
        IntrafuseError: the data holds no batch, or one that is too small; `pruned` is then as it
            was.
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
    """Set the statistics of a norm without scale and shift so that its outputs have others."""
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
    """Let batch norms average the statistics of all batches."""
    with evaluating(model):  # also puts back momentum, and what is no norm's
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        feed(model, _inputs(data, model), advice=ADVICE)
        found = [copy.deepcopy(norm.state_dict()) for norm in norms.values()]
    for (name, norm), state in zip(norms.items(), found, strict=True):
        if not all(t.isfinite().all() for t in state.values()):
            raise IntrafuseError(
                "statistics must be finite on the data",
                layer=name.rpartition(".")[0],
                remedy=FINITE,
            )
        norm.load_state_dict(state)


def _inputs(data: Iterable, model: nn.Module) -> Iterator[Any]:
    for inputs, _ in batches(data, model, purpose="repair of batch norm"):
        yield inputs


def _targets(original: nn.Module, plan: Plan, data: Iterable) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure mean and variance (channels,) of each norm's output, merged as the plan says."""
    layers = {norm.mean: norm.layer for norm in plan.graph.norms}

    def merged(mean: str, output: Tensor) -> Tensor:
        tree = plan.graph.axes[mean][0]
        found = merged_output(plan, tree, layers[mean], output.double())
        return found.movedim(1, -1).flatten(0, -2)

    watched = [
        (norm.mean, original.get_submodule(norm.name), partial(merged, norm.mean))
        for norm in plan.graph.norms
    ]
    sums, _ = measure(original, watched, _inputs(data, original), advice=ADVICE)
    return {name: (known.mean(), known.variance()) for name, known in sums.items()}


def merged_output(plan: Plan, tree: Tree, layer: str | None, output: Tensor) -> Tensor:
    """Apply a plan to what a layer or norm of the original puts out.

    Args:
        plan: its maps encode, then scale and shift.
        tree: which channels the outputs hold.
        layer: name of the weight that wrote them, or None.
        output: (batch, channels, ...).

    Returns:
        What the pruned network should put out there.
    """
    sizes = dict(plan.graph.sizes)
    for step in plan.maps:
        group = plan.graph.by_name[step.group]
        blocks = locate(tree, group.id, sizes)
        if blocks:
            output = step.encoding.apply(output, 1, blocks, group.size)
        sizes[group.id] = step.width
        gain, shift = step.writer_gain.get(layer or ""), step.writer_shift.get(layer or "")
        if blocks and not (gain is None and shift is None):
            where = locate(tree, group.id, sizes)
            lines = torch.ones(output.shape[1]), torch.zeros(output.shape[1])
            for line, values in zip(lines, (gain, shift), strict=True):
                put_channels(line, where, values, step.width)
            scale, offset = (line.view(-1, *[1] * (output.dim() - 2)) for line in lines)
            output = output * scale.to(output) + offset.to(output)
    return output
