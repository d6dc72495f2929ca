"""Find the operator where a pruned network begins to compute something else than its reference."""

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
    """Where two networks part.

    Attributes:
        groups: those of the plan whose channels meet there.
        where: the operator, and its line of the model's code where that is known.
    """

    groups: tuple[str, ...]
    where: str


def first_fault(
    silent: nn.Module, small: nn.Module, plan: Plan, inputs: ExampleInputs, tolerance: float
) -> Fault | None:
    """Run two networks operator by operator and find where the channels that stay differ first.

    Args:
        silent: the original with the channels silenced that the plan drops.
        small: the original without them.
        plan: a plan of `select` that was made, not loaded.
        inputs: what to run both with.
        tolerance: how far a tensor may differ, as a share of its largest entry.

    Returns:
        The operator; None where none is found, or where the two do not run the same operators.
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
        return None  # what is looked for is a better message for an error that is known
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
