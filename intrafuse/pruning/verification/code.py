"""Hold the code of a pruned network against its plan, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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

TRIALS = 24  # of parts of a plan, while the groups at fault are looked for


def check_code(
    pruned: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    original: nn.Module | None = None,
) -> None:
    """Trace a pruned network and compare it with the plan, operator by operator.

    Code may hold a size as a number (a reshape, a branch, a factor such as ``x.shape[1] ** -0.5``).
    Then the pruned network would run something else than was planned.

    Args:
        pruned: what the plan made of its network.
        plan: a plan that was made, not loaded.
        example_inputs: what to trace with.
        original: the network that the plan was made for; with it, an error names the groups that
            must keep their size.

    Raises:
        IntrafuseError: an operator, a shape or a factor differs; names the line of code.
    """
    error = _fault(pruned, plan, example_inputs)
    if error is None:
        return
    remedy = "exclude the layers that write these channels, or let the code not use the number"
    if original is not None:

        def works(steps: list[MergeMap]) -> bool:
            some = replace(plan, maps=tuple(steps))
            return _fault(some.apply(original), some, example_inputs) is None

        guilty = culprits(plan.maps, works)
        remedy = f"exclude={guilty} (--exclude), or let the code not use the number"
    raise IntrafuseError(error.rule, layer=error.layer, remedy=remedy) from error


def _fault(pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> IntrafuseError | None:
    """Find what a pruned network does otherwise than planned."""
    program, sizes = plan.graph.program, plan.graph.resized(plan.widths)
    expected = Expected(
        program.nodes, program.values, program.scales, program.starts, plan.graph.sizes
    )
    try:
        found = first_difference(expected, record(pruned, example_inputs), sizes)
        if found is not None:  # perhaps in what an export leaves out
            now = export_program(pruned, example_inputs).graph.nodes
            found = first_difference(expected, now, sizes)
    except IntrafuseError as error:
        rule = f"the code depends on a number of channels: {error.rule}"
        return IntrafuseError(f"{rule}, but only once the network is pruned", layer=error.layer)
    if found is None:
        return None
    return IntrafuseError(
        f"the code depends on a number of channels: operator {operator_name(found.node)} "
        f"{found.rule}, but not once the network is pruned, where it is {found.value}",
        layer=location(found.node) or found.node.name,
    )


def culprits(steps: Sequence[MergeMap], works: Callable[[list[MergeMap]], bool]) -> list[str]:
    """List groups without which the rest of a plan works, found by halving.

    After some trials those that are known are listed; all of them, where none is.
    """
    left, guilty, trials = [*steps], [], 0
    while trials < TRIALS and left and not works(left):
        fine, failing = 0, len(left)
        while failing - fine > 1:
            trials += 1
            half = (fine + failing) // 2
            fine, failing = (half, failing) if works(left[:half]) else (fine, half)
        trials += 1
        guilty.append(left.pop(failing - 1).group)
    return guilty or [step.group for step in steps]
