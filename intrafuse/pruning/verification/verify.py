"""Verify a plan of `select` against a copy of the network whose dropped channels are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from intrafuse.graph.trace import ExampleInputs
from intrafuse.pruning.verification.code import check_code
from intrafuse.pruning.verification.compare import compare, disagreement
from intrafuse.pruning.verification.outputs import lively
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.merge_map import PARTS, MergeMap

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["Verification", "is_selection", "verify"]


@dataclass(frozen=True)
class Verification:
    """How far the outputs of a pruned network differ from those of the masked original.

    Attributes:
        groups: number of channel groups that the plan shrinks.
        difference: the largest absolute difference of any output.
        relative: the same, as a share of the largest absolute output of the masked original.
        effect: the largest absolute change that the masks make, as the same share; if it is close
            to zero, agreement proves little.
        tolerance: the largest accepted `relative`.
    """

    groups: int
    difference: float
    relative: float
    effect: float
    tolerance: float


@apart
def verify(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: ExampleInputs | None = None,
    tolerance: float = 1e-4,
) -> Verification:
    """Compare the pruned network with a copy of the original whose dropped channels are masked.

    Args:
        model: the network that the plan was made for; it is not changed.
        plan: a plan of the method `select`, which does not change the kept channels.
        example_inputs: inputs for both, of any sizes that the model takes; by default those that
            it was traced with. Constant floating inputs reveal nothing and are replaced by seeded
            noise.
        tolerance: how far the outputs may differ, as a share of the largest.

    Returns:
        The largest differences.

    Raises:
        IntrafuseError: a group is merged rather than selected, the code depends on a number of
            channels, a network cannot run, or the outputs differ; the error names the group or
            the line.

    >>> import torch, intrafuse
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = intrafuse.plan(net, torch.zeros(1, 4), channels=0.5, method="select")
    >>> verify(net, plan).relative < 1e-6
    True
    """
    check_arguments(model=model, tolerance=tolerance)
    if not hasattr(plan, "maps"):
        raise IntrafuseError(
            "plan must be an intrafuse.Plan", value=type(plan).__name__, usage=True
        )
    for merge_map in plan.maps:
        _require_selection(merge_map)
    program = plan.graph.traced
    if example_inputs is None:
        if program is None:
            raise IntrafuseError(
                "a loaded plan does not know the inputs of its model",
                remedy="pass example_inputs",
            )
        example_inputs = program.example_inputs
    inputs = lively(example_inputs)
    if plan.maps and program is not None:
        check_code(plan.apply(model), plan, program.example_inputs, original=model)
    seen = compare(model, plan, inputs)
    if not seen.relative <= tolerance:
        raise disagreement(model, plan, inputs, seen, tolerance)
    return Verification(len(plan.maps), seen.difference, seen.relative, seen.effect, tolerance)


def is_selection(merge_map: MergeMap) -> bool:
    """Tell whether a map only selects channels, without gains, shifts or readouts."""
    return merge_map.keep is not None and not any(getattr(merge_map, part) for part in PARTS)


def _require_selection(merge_map: MergeMap) -> None:
    if not is_selection(merge_map):
        raise IntrafuseError(
            "only a plan that selects channels has a masked reference, but this group is merged "
            "or repaired",
            layer=merge_map.group,
            remedy='verify a plan with method="select" and the same budget',
        )
