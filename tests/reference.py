"""Masked references: what a network computes when channels are silenced instead of removed.

Independent ones, for plans of `select`. Each keeps every shape of the original network:

- `mask_readers` sets to zero what readers take from dropped channels;
- `mask_writers` sets to zero what writers and carriers put into them, which is the same only
  where every operator between them maps zero to zero;
- `mask_channels` does both, which also silences the width of queries and keys, that no layer reads.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from intrafuse.graph.blocks import positions
from intrafuse.pruning.plan import Plan


def _mask(model: nn.Module, plan: Plan, roles: tuple[str, ...]) -> nn.Module:
    masked = copy.deepcopy(model)
    state = masked.state_dict(keep_vars=True)
    for step in plan.maps:
        group = plan.graph.by_name[step.group]
        dropped = sorted(set(range(group.size)) - set(step.keep.tolist()))
        for slot in group.slots:
            if slot.role not in roles or slot.parameter not in state or slot.kind == "variance":
                continue
            where = positions(slot.blocks, group.size)[dropped].ravel()
            with torch.no_grad():
                state[slot.parameter].movedim(slot.axis, 0)[torch.from_numpy(where)] = 0
    return masked


def mask_readers(model: nn.Module, plan: Plan) -> nn.Module:
    return _mask(model, plan, ("reader",))


def mask_writers(model: nn.Module, plan: Plan) -> nn.Module:
    return _mask(model, plan, ("writer", "carrier"))


def mask_channels(model: nn.Module, plan: Plan) -> nn.Module:
    """Silence dropped channels everywhere: also those that only meet in a product, as queries."""
    return _mask(model, plan, ("writer", "carrier", "reader"))
