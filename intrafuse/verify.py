"""Check that the code of a pruned network computes what the plan expects of it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Node

from intrafuse.errors import IntrafuseError
from intrafuse.graph.axes import tree_size
from intrafuse.graph.rules import location, operator_name
from intrafuse.graph.rules.pointwise import BINARY, UNARY
from intrafuse.graph.trace import ExampleInputs, export_program
from intrafuse.plan import Plan

__all__ = ["check_code"]

ARITHMETIC = frozenset((*UNARY, *BINARY))


def check_code(pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> None:
    """Trace a pruned network and compare it with the plan, operator by operator.

    Code may hold a size as a number (a reshape, a branch, a factor such as ``x.shape[1] ** -0.5``).
    Then the pruned network would run something else than was planned.

    Raises:
        IntrafuseError: an operator, a shape or a factor differs; names the line of code.
    """
    program = plan.graph.program
    sizes = plan.graph.resized(plan.widths)
    old = [node for node in program.nodes if node.op == "call_function"]
    new = [n for n in export_program(pruned, example_inputs).graph.nodes if n.op == "call_function"]
    for before, after in zip(old, new, strict=False):
        value = after.meta.get("val")
        if operator_name(before) != operator_name(after):
            raise _differs(before, "runs another operator", operator_name(after))
        if isinstance(value, Tensor):
            expected = [tree_size(tree, sizes) for tree in program.values[before]]
            if list(value.shape) != expected:
                raise _differs(before, f"should give {expected}", list(value.shape))
        if operator_name(before) in ARITHMETIC and _numbers(before) != _numbers(after):
            raise _differs(before, f"computes with {_numbers(before)}", _numbers(after))
    if len(old) != len(new):
        raise _differs((old or new)[-1], f"is one of {len(old)} operators", len(new))


def _numbers(node: Node) -> list[float]:
    return [float(a) for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float)]


def _differs(node: Node, rule: str, value: object) -> IntrafuseError:
    return IntrafuseError(
        f"the code depends on a number of channels: operator {operator_name(node)} {rule}, but "
        "not once the network is pruned",
        value=value,
        layer=location(node) or node.name,
        remedy="exclude the layers that write these channels, or let the code not use the number",
    )
