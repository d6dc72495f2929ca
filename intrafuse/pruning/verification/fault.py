"""Find the first operator where a pruned network and its reference compute different values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from intrafuse.graph.axes import leaves
from intrafuse.graph.rules import location, operator_name
from intrafuse.graph.sizes.compare import calls
from intrafuse.graph.trace import ExampleInputs, export_program
from intrafuse.pruning.verification.outputs import distance, floating, largest
from intrafuse.pruning.verification.reference import Reference, placed
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["Fault", "first_fault"]


@dataclass(frozen=True)
class Fault:
    """Where two networks first differ.

    Attributes:
        groups: the groups of the plan whose channels meet there.
        where: the operator, and its line in the model's code if known.
    """

    groups: tuple[str, ...]
    where: str


def first_fault(
    silent: nn.Module, small: nn.Module, plan: Plan, inputs: ExampleInputs, tolerance: float
) -> Fault | None:
    """Run two networks operator by operator and find where the kept channels first differ.

    Args:
        silent: the original with the dropped channels masked.
        small: the original without the dropped channels.
        plan: a plan of `select` made in this process, not loaded.
        inputs: inputs for both.
        tolerance: how far a tensor may differ, as a share of its largest entry.

    Returns:
        The operator; None if there is none, or if the two do not run the same operators.
    """
    try:
        first, second = (export_program(model, inputs) for model in (silent, small))
        long = Reference(first, plan.graph, plan)
        short = fx.Interpreter(second.graph_module)
        for runner, program in ((long, first), (short, second)):
            runner.garbage_collect_values = False
            with torch.no_grad():
                runner.run(*placed(program, inputs))
        nodes = zip(long.known.items(), _calls(short), strict=True)
    except (IntrafuseError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # the caller raises its own error, without the operator
    for (own, known), other in nodes:
        if not isinstance(long.env[own], Tensor) or operator_name(own) != operator_name(other):
            continue
        wanted = floating(long.staying(known, long.env[own]))
        if distance(floating(short.env[other]), wanted) > tolerance * largest(wanted):
            met = {a for n in (known, *known.all_input_nodes) for a in _atoms(plan, n)}
            names = [s.group for s in plan.maps if plan.graph.by_name[s.group].id in met]
            line = location(own)
            where = f"operator {operator_name(own)}" + (f" at {line}" if line else "")
            return Fault(tuple(names), where)
    return None


def _calls(runner: fx.Interpreter) -> list[fx.Node]:
    return calls(runner.graph.nodes)  # type: ignore[union-attr]


def _atoms(plan: Plan, node: fx.Node) -> list[int]:
    values: Any = plan.graph.program.values.get(node, ())
    return [a for v in values for t in (v if isinstance(v, list) else [v]) for a in leaves(t)]
