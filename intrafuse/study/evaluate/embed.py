"""Embed a pruned network in the shapes of the original, with the same function."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from intrafuse.pruning.plan import Plan
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["embed", "folded"]


def folded(plan: Plan, model: nn.Module) -> Weights:
    """Return the tensors of the network before pruning, with batch norm folded."""
    weights = Weights.of(plan.graph, model)
    fold_norms(weights)
    return weights


def embed(plan: Plan, model: nn.Module) -> Weights:
    """Return the tensors of the pruned network at the shapes of the original.

    Each channel takes the position of its original channel, or of one with a large weight in it.
    Writers and readers of the other positions are zero. Batch norm is folded, as in `folded`.

    Args:
        plan: the plan of the pruned network.
        model: the network before pruning.
    """
    weights = plan.weights(model)
    if not plan.fold:
        fold_norms(weights)
    weights.forget()
    for step in reversed(plan.maps):
        places = torch.zeros(step.size, step.width)
        places[_positions(step), torch.arange(step.width)] = 1.0
        weights.merge(MergeMap.linear(step.group, places))
    whole = folded(plan, model)
    for norm in plan.graph.own_norms:
        if norm.layer is not None:  # it is the identity in both
            weights.put({name: whole.state[name] for name in norm.tensors})
    return weights


def _positions(step: MergeMap) -> Tensor:
    """Choose a different position among the n channels for each of the m channels."""
    if step.keep is not None:
        return step.keep
    from scipy.optimize import linear_sum_assignment  # slow to import

    _, columns = linear_sum_assignment(step.encode.abs().numpy(), maximize=True)
    return torch.from_numpy(columns.astype(np.int64))
