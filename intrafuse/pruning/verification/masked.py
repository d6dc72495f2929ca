"""Silence channels instead of removing them: what a pruned network is held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from intrafuse.graph.blocks import positions
from intrafuse.graph.rules.computed import COMPUTED
from intrafuse.support.modules import copy_without
from intrafuse.surgery.merge_map import MergeMap

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["masked", "selecting"]


def masked(model: nn.Module, plan: Plan, *, share: bool = False) -> nn.Module:
    """Copy a network and silence the channels that a plan of `select` drops.

    Layers write nothing into them and read nothing out of them. Weights that are computed from
    parameters, by a norm that may not be zero, are left as they are: readers ignore their channels.
    With `share` the copy holds the network's own parameters where they have no such channel.
    """
    groups = [plan.graph.by_name[step.group] for step in plan.maps]
    touched = {slot.parameter for group in groups for slot in group.slots}
    kept = [p for n, p in model.named_parameters() if n not in touched] if share else []
    copied = copy_without(model, kept)
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    for step, group in zip(plan.maps, groups, strict=True):
        assert step.keep is not None
        dropped = sorted(set(range(group.size)) - set(step.keep.tolist()))
        for slot in group.readers if COMPUTED in group.chosen else group.slots:
            tensor = tensors.get(slot.parameter)
            if tensor is None or slot.kind in ("variance", "function"):
                continue
            where = torch.from_numpy(positions(slot.blocks, group.size)[dropped].ravel())
            tensor.detach().movedim(slot.axis, 0)[where.to(tensor.device)] = 0
    return copied


def selecting(plan: Plan, seed: int = 0) -> Plan:
    """Make the plan that gives every group its width by selecting channels at random.

    Random, because the first channels, or the last, would hide code that counts from there.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for step in plan.maps:
        keep = torch.randperm(step.size, generator=generator)[: step.width]
        maps.append(MergeMap.select(step.group, step.size, keep))
    return replace(plan, maps=tuple(maps), fold=False)
