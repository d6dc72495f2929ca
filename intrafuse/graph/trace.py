"""Trace a model to a channel graph: export it, run one rule per operator, freeze the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from intrafuse.graph.export import (
    ExampleInputs,
    as_arguments,
    caching,
    evaluating,
    export_program,
    record,
)
from intrafuse.graph.frozen import free_atoms, freeze, hold, lock_unclear
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.program import Program
from intrafuse.graph.rules import RULES, LockError, Scope, location, operator_name
from intrafuse.graph.rules.products import tie_packed_heads
from intrafuse.graph.rules.registry import VIEWS, Result
from intrafuse.graph.sizes.literals import Workshop, settle
from intrafuse.graph.typed import is_several
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.modules import copy_without, place

__all__ = [
    "ExampleInputs",
    "Program",
    "as_arguments",
    "evaluating",
    "export_program",
    "trace",
]

CONSTANT = "a tensor of the model's code that is not a buffer"
# Errors of a rule that does not understand its arguments.
ODD = (KeyError, IndexError, TypeError, ValueError, AttributeError, GuardOnDataDependentSymNode)
PASS_ORIGIN = VIEWS | {"index"}


@apart
def trace(
    model: nn.Module, example_inputs: ExampleInputs, *, include: Sequence[str] = ()
) -> ChannelGraph:
    """Find the channel groups of a model.

    Args:
        model: any module that `torch.export` accepts. The module is not changed.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs. Their sizes matter,
            because multiply-accumulates are counted for them. Their values do not matter.
        include: patterns of group names, such as `["*#normed"]`. Groups that a layer norm or RMS
            norm reduces over are locked unless a pattern matches their name.

    Returns:
        The channel graph: prunable groups from input to output, locked groups with reasons.

    Raises:
        IntrafuseError: the model cannot be traced.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(group.name, group.size) for group in trace(model, torch.zeros(1, 4)).groups]
    [('0', 8)]
    """
    check_arguments(include=include)
    args, kwargs = as_arguments(example_inputs)
    program = export_program(model, example_inputs)
    _require_sizes(program.graph.nodes)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 1]
    if any(tensor.numel() == 0 for tensor in tensors):
        raise IntrafuseError(
            "example inputs must hold a sample", value=[tuple(t.shape) for t in tensors]
        )
    scope = Scope(model, tensors[0].shape[0] if tensors else 1, _aliases(model))
    _enter(scope, program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _apply_rule(scope, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                _lock_all(scope, source, "model output")
    nodes = tuple(program.graph.nodes)
    tie_packed_heads(scope)
    lock_unclear(scope)
    hold(scope, include)
    settle(
        scope,
        [*nodes],
        lambda: free_atoms(scope),
        Workshop(
            lambda shapes, attributes: _resized(model, shapes, attributes, scope.aliases),
            lambda resized, each: record(resized, example_inputs, each=each),
            lambda resized: [*export_program(resized, example_inputs).graph.nodes],
            partial(record, example_inputs=example_inputs, cached=True) if caching(model) else None,
        ),
    )
    return freeze(scope, nodes, example_inputs)


def _require_sizes(nodes: Iterable[Node]) -> None:
    """Refuse sizes that depend on numbers in tensors, because their channels are unknown."""
    for node in nodes:
        for value in tree_leaves(node.meta.get("val")):
            if any(isinstance(n, torch.SymInt) for n in getattr(value, "shape", ())):
                raise IntrafuseError(
                    "a size must not depend on numbers in tensors, but that of operator "
                    f"{operator_name(node)} does",
                    layer=location(node) or node.name,
                    remedy="multiply by a mask instead of indexing by it, or trace the part of "
                    "the model that should be pruned",
                )


def _resized(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, int]],
    aliases: Mapping[str, str],
) -> nn.Module:
    """Copy a model with new shapes. Tensors of a new shape are uninitialized, others are shared."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    new = {
        name: torch.empty(shape, dtype=old[name].dtype, device=old[name].device)
        for name, shape in shapes.items()
        if name in old and tuple(old[name].shape) != shape
    }
    target = copy_without(model, [*old.values()])
    place(target, new, attributes, (), aliases)
    return target


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*named, *model.named_buffers(remove_duplicate=False)]:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


def _enter(scope: Scope, program: ExportedProgram) -> None:
    """Assign axes to parameters, buffers, constants and inputs."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if node.name in names:
            name = scope.aliases.get(names[node.name], names[node.name])
            known = scope.parameter_axes.get(name)
            scope.values[node] = known or [scope.table.atom(int(n)) for n in value.shape]
            scope.parameter_axes[name] = scope.values[node]
            scope.parameters[node] = name
        elif isinstance(value, Tensor):
            constant = signature.inputs_to_lifted_tensor_constants.get(node.name)
            reason = f"{CONSTANT} ({constant})" if constant else "model input"
            scope.values[node] = [scope.fixed(int(n), reason) for n in value.shape]


def _apply_rule(scope: Scope, node: Node) -> None:
    name = operator_name(node)
    rule = RULES.get(name)
    try:
        if rule is None:
            raise LockError("it has no rule")
        result = rule(scope, node)
        if not _agrees(scope, result, node.meta.get("val")):
            raise LockError("its rule does not fit these arguments")
    except LockError as error:
        result = _lock_operator(scope, node, f"operator {name}{scope.where(node)}: {error}")
    except ODD as error:
        text = f"its rule failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        result = _lock_operator(scope, node, f"operator {name}{scope.where(node)}: {text}")
    scope.values[node] = result
    sources = node.all_input_nodes
    if name in PASS_ORIGIN and sources:
        origin = scope.parameters.get(sources[0]) or scope.origins.get(sources[0])
        if origin is not None:
            scope.origins[node] = origin


def _agrees(scope: Scope, result: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        sizes = [scope.table.measure(scope.table.resolve(tree)) for tree in result]
        return sizes == [int(n) for n in value.shape]
    if is_several(value):
        return len(result) == len(value) and all(map(_agrees, [scope] * len(value), result, value))
    return True


def _lock_operator(scope: Scope, node: Node, reason: str) -> Result:
    for source in node.all_input_nodes:
        _lock_all(scope, source, reason)
    value = node.meta.get("val")
    if is_several(value):
        return [[scope.fixed(int(n), reason) for n in getattr(v, "shape", ())] for v in value]
    return [scope.fixed(int(n), reason) for n in getattr(value, "shape", ())]


def _lock_all(scope: Scope, node: Node, reason: str) -> None:
    for tree in scope.trees(node):
        scope.table.lock(tree, reason)
