"""Compare the code of a pruned network with its plan, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from intrafuse.graph.export import export_program, record
from intrafuse.graph.rules import location, operator_name
from intrafuse.graph.sizes.compare import Expected, first_difference
from intrafuse.graph.trace import ExampleInputs
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.merge_map import MergeMap

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["check_code", "culprits"]

TRIALS = 24  # most parts of a plan to try while searching for the groups at fault


def check_code(
    pruned: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    original: nn.Module | None = None,
) -> None:
    """Trace a pruned network and compare it with the plan, operator by operator.

    Code may hold a size as a number (a reshape, a branch, a factor such as ``x.shape[1] ** -0.5``).
    Such a pruned network would not run what was planned.

    Args:
        pruned: the network that the plan returned.
        plan: a plan made in this process, not loaded.
        example_inputs: what to trace with.
        original: the network that the plan was made for; if given, an error names the groups that
            must keep their size.

    Raises:
        IntrafuseError: an operator, a shape or a factor differs; the error names the line of code.
    """
    error = _fault(pruned, plan, example_inputs)
    if error is None:
        return
    remedy = "exclude the layers that write these channels, or rewrite the code without the number"
    if original is not None:

        def works(maps: list[MergeMap]) -> bool:
            some = plan.with_maps(maps)
            return _fault(some.apply(original), some, example_inputs) is None

        guilty = culprits(plan.maps, works)
        remedy = f"exclude={guilty} (--exclude), or rewrite the code without the number"
    raise IntrafuseError(error.rule, layer=error.layer, remedy=remedy) from error


def _fault(pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> IntrafuseError | None:
    """Find where the operators of a pruned network differ from the plan."""
    program, sizes = plan.graph.program, plan.graph.resized(plan.widths)
    expected = Expected(
        program.nodes, program.values, program.scales, program.starts, plan.graph.sizes
    )
    try:
        difference = first_difference(expected, record(pruned, example_inputs), sizes)
        if difference is not None:  # an export may leave the differing operator out
            now = export_program(pruned, example_inputs).graph.nodes
            difference = first_difference(expected, now, sizes)
    except IntrafuseError as error:
        rule = f"the code depends on a number of channels: {error.rule}"
        return IntrafuseError(f"{rule}, but only after pruning", layer=error.layer)
    if difference is None:
        return None
    return IntrafuseError(
        f"the code depends on a number of channels: operator "
        f"{operator_name(difference.node)} {difference.rule}, but after pruning it is "
        f"{difference.value}",
        layer=location(difference.node) or difference.node.name,
    )


def culprits(maps: Sequence[MergeMap], works: Callable[[list[MergeMap]], bool]) -> list[str]:
    """Find by bisection the groups without which the rest of a plan works.

    The search stops after `TRIALS` trials and lists the groups found so far, or all groups if it
    found none.
    """
    left, guilty, trials = [*maps], [], 0
    while trials < TRIALS and left and not works(left):
        fine, failing = 0, len(left)
        while failing - fine > 1:
            trials += 1
            half = (fine + failing) // 2
            fine, failing = (half, failing) if works(left[:half]) else (fine, half)
        trials += 1
        guilty.append(left.pop(failing - 1).group)
    return guilty or [merge_map.group for merge_map in maps]
