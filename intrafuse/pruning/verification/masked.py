"""Mask channels instead of removing them, as the reference of a pruned network."""

from __future__ import annotations

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
    """Copy a network and mask the channels that a plan of `select` drops.

    Layers write zeros into these channels and read them with zero weights. Weights that are
    computed from parameters, by a norm that may not be zero, do not change; their channels are
    masked in the readers only. With `share` the copy holds the network's own parameters where they
    have no dropped channel.
    """
    groups = [plan.graph.by_name[merge_map.group] for merge_map in plan.maps]
    touched = {slot.parameter for group in groups for slot in group.slots}
    kept = [p for n, p in model.named_parameters() if n not in touched] if share else []
    copied = copy_without(model, kept)
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    for merge_map, group in zip(plan.maps, groups, strict=True):
        assert merge_map.keep is not None
        dropped = sorted(set(range(group.size)) - set(merge_map.keep.tolist()))
        for slot in group.readers if COMPUTED in group.chosen else group.slots:
            tensor = tensors.get(slot.parameter)
            if tensor is None or slot.kind in ("variance", "function"):
                continue
            where = torch.from_numpy(positions(slot.blocks, group.size)[dropped].ravel())
            tensor.detach().movedim(slot.axis, 0)[where.to(tensor.device)] = 0
    return copied


def selecting(plan: Plan, seed: int = 0) -> Plan:
    """Make a plan of the same widths that selects channels at random.

    Selecting the first or last channels could hide code that indexes from that end.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for merge_map in plan.maps:
        keep = torch.randperm(merge_map.size, generator=generator)[: merge_map.width]
        maps.append(MergeMap.select(merge_map.group, merge_map.size, keep))
    return plan.with_maps(maps, fold=False)
