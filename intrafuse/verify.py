"""Check that the code of a pruned network computes what the plan expects of it."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from intrafuse.errors import IntrafuseError
from intrafuse.graph.compare import first_difference
from intrafuse.graph.rules import location, operator_name
from intrafuse.graph.trace import ExampleInputs, export_program
from intrafuse.plan import Plan

__all__ = ["check_code"]


def check_code(pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> None:
    """Trace a pruned network and compare it with the plan, operator by operator.

    Code may hold a size as a number (a reshape, a branch, a factor such as ``x.shape[1] ** -0.5``).
    Then the pruned network would run something else than was planned.

    Raises:
        IntrafuseError: an operator, a shape or a factor differs; names the line of code.
    """
    program = plan.graph.program
    found = first_difference(
        program.nodes,
        export_program(pruned, example_inputs).graph.nodes,
        program.values,
        program.scales,
        plan.graph.sizes,
        plan.graph.resized(plan.widths),
    )
    if found is not None:
        raise _differs(found.node, found.rule, found.value)


def _differs(node: Node, rule: str, value: object) -> IntrafuseError:
    return IntrafuseError(
        f"the code depends on a number of channels: operator {operator_name(node)} {rule}, but "
        "not once the network is pruned",
        value=value,
        layer=location(node) or node.name,
        remedy="exclude the layers that write these channels, or let the code not use the number",
    )
