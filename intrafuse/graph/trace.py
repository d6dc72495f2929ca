"""Model -> channel graph: export, run one rule for each operator, freeze what was found."""

from __future__ import annotations

import io
import linecache
import logging
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.backends.mha
from torch import Tensor, nn
from torch.fx import Node

from intrafuse import errors
from intrafuse.errors import IntrafuseError
from intrafuse.graph.axes import Product, Sum, Tree, leaves, locate
from intrafuse.graph.groups import Attribute, ChannelGraph, ChannelGroup, Cost, Norm, Slot
from intrafuse.graph.literals import settle
from intrafuse.graph.rules import RULES, LockError, Scope, operator_name
from intrafuse.modules import copy_without, place

__all__ = [
    "ExampleInputs",
    "Program",
    "as_arguments",
    "evaluating",
    "export_program",
    "trace",
]

ExampleInputs = Tensor | tuple | list | Mapping[str, Any]
PASS_ORIGIN = frozenset(
    "view reshape unsqueeze squeeze expand permute transpose t index slice select to clone "
    "contiguous alias detach repeat".split()
)


@dataclass(frozen=True)
class Program:
    """The traced operators: nodes in order, the trees of each result, names of parameters.

    It also keeps the inputs that the model was traced with, and numbers in the code that follow a
    size: operator -> (tree of the size, exponent).
    """

    nodes: tuple[Node, ...]
    values: Mapping[Node, Any]
    parameters: Mapping[Node, str]
    scales: Mapping[Node, tuple[Tree, float]]
    example_inputs: ExampleInputs


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple, dict[str, Any]]:
    """Turn example inputs (a tensor, a tuple of args or a mapping of kwargs) into a call."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode, and every module back into its own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Find the channel groups of a model.

    Args:
        model: any module that `torch.export` takes; it is not changed.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs. Sizes matter
            (multiply-accumulates are counted for them), values do not.

    Returns:
        The channel graph: prunable groups from input to output, locked groups with reasons.

    Raises:
        IntrafuseError: the model cannot be traced.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(group.name, group.size) for group in trace(model, torch.zeros(1, 4)).groups]
    [('0', 8)]
    """
    args, kwargs = as_arguments(example_inputs)
    program = export_program(model, example_inputs)
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
    _lock_unclear(scope)
    settle(
        scope,
        [*nodes],
        lambda: [group.id for group in _name_groups(scope, _slots(scope)) if not group.locked],
        lambda shapes, attributes: _resized(model, shapes, attributes, scope.aliases),
        lambda resized: export_program(resized, example_inputs).graph.nodes,
    )
    return _freeze(scope, nodes, example_inputs)


def _resized(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, int]],
    aliases: Mapping[str, str],
) -> nn.Module:
    """Copy a model without its values: tensors of other shapes are new, and hold nothing."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    new = {
        name: torch.empty(shape, dtype=old[name].dtype, device=old[name].device)
        for name, shape in shapes.items()
        if name in old and tuple(old[name].shape) != shape
    }
    target = copy_without(model, [*old.values()])
    place(target, new, attributes, (), aliases)
    return target


def export_program(model: nn.Module, example_inputs: ExampleInputs) -> torch.export.ExportedProgram:
    """Export a model in evaluation mode; it is not changed.

    Raises:
        IntrafuseError: it is no module, or it cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise IntrafuseError("the model must be a torch.nn.Module", value=type(model).__name__)
    args, kwargs = as_arguments(example_inputs)
    try:
        with evaluating(model):
            return _export(model, args, kwargs)
    except NotImplementedError as error:  # an exported program has no evaluation mode
        raise IntrafuseError(
            f"the model cannot be put in evaluation mode: {error}",
            remedy="pass the module that was exported, not the exported one",
        ) from error


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the graph of a failed export to standard error
    try:
        with torch.no_grad(), redirect_stderr(printed), _without_warnings(), _plainly(model):
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        operator = _last_operator(error)
        raise IntrafuseError(
            "the model cannot be traced by torch.export: "
            f"{type(error).__name__}: {text.splitlines()[0]}"
            + (f", in operator {operator}" if operator else ""),
            layer=_failing_line(error),
            remedy="check that model(*example_inputs) runs, replace control flow that depends on "
            "tensor values, or trace the part of the model that should be pruned",
        ) from error
    sys.stderr.write(printed.getvalue())
    return program


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Let a model compute without fused kernels and without a cache for its next call.

    A fused transformer layer is one operator that hides what it does, and a cache of keys and
    values is an output that `torch.export` does not know.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in cached:
            config.use_cache = True


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what torch logs on the way to an error that says the same.

    It also warns of modules that keep tensors in lists, as recurrent layers do.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _last_operator(error: Exception) -> str | None:
    """Name the last operator that was recorded before an export failed, where it tells."""
    graph = getattr(error, "partial_fx_graph", None)
    names = re.findall(r"torch\.ops\.([\w.]+)\(", str(getattr(graph, "code", graph)))
    return names[-1] if names else None


def _failing_line(error: Exception) -> str | None:
    """Find the last line of the model's code, outside PyTorch and this package, that was run."""
    libraries = tuple(f"{Path(str(m.__file__)).parent}{os.sep}" for m in (torch, errors))
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in frames if not name.startswith((*libraries, "<"))]
    if not own:
        return None
    name, line = own[-1]
    return f"{name}:{line}: {linecache.getline(name, line or 0).strip()}"


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*named, *model.named_buffers(remove_duplicate=False)]:
        if first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


def _enter(scope: Scope, program) -> None:
    """Give axes to parameters, buffers, constants and inputs."""
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
            constant = node.name in signature.inputs_to_lifted_tensor_constants
            reason = "constant of the model's code" if constant else "model input"
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
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        text = f"its rule failed: {type(error).__name__}: {error}"
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
    if isinstance(value, tuple | list):
        return len(result) == len(value) and all(map(_agrees, [scope] * len(value), result, value))
    return True


def _lock_operator(scope: Scope, node: Node, reason: str) -> Any:
    for source in node.all_input_nodes:
        _lock_all(scope, source, reason)
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return [[scope.fixed(int(n), reason) for n in getattr(v, "shape", ())] for v in value]
    return [scope.fixed(int(n), reason) for n in getattr(value, "shape", ())]


def _lock_all(scope: Scope, node: Node, reason: str) -> None:
    values = scope.values.get(node, [])
    for item in values:
        for tree in item if isinstance(item, list) else [item]:
            scope.table.lock(tree, reason)


def _slots(scope: Scope) -> dict[int, list[Slot]]:
    """List where each atom lies on parameters that a rule gave a role."""
    slots: dict[int, list[Slot]] = {}
    for (parameter, axis), (role, kind) in scope.roles.items():
        tree = scope.table.resolve(scope.parameter_axes[parameter][axis])
        for atom in dict.fromkeys(leaves(tree)):
            blocks = locate(tree, atom, scope.table.size)
            slots.setdefault(atom, []).append(Slot(parameter, axis, role, kind, blocks))
    return slots


def _freeze(scope: Scope, nodes: tuple[Node, ...], example_inputs: ExampleInputs) -> ChannelGraph:
    resolve = scope.table.resolve
    axes = {name: tuple(map(resolve, trees)) for name, trees in scope.parameter_axes.items()}
    groups = _name_groups(scope, _slots(scope))
    free = [group for group in groups if not group.locked]
    free = [replace(group, index=len(free) - 1 - i) for i, group in enumerate(free)]
    attributes = (Attribute(a.module, a.name, resolve(a.tree)) for a in scope.attributes)
    values = {
        node: [list(map(resolve, v)) if isinstance(v, list) else resolve(v) for v in value]
        for node, value in scope.values.items()
    }
    scales = {node: (resolve(tree), power) for node, (tree, power) in scope.scales.items()}
    return ChannelGraph(
        groups=tuple(free),
        locked=tuple(group for group in groups if group.locked),
        axes=axes,
        sizes=dict(enumerate(scope.table.size)),
        layers=scope.layers,
        norms=_list_norms(scope),
        attributes=tuple(dict.fromkeys(attributes)),
        costs=tuple(Cost(c.layer, c.factor, tuple(map(resolve, c.trees))) for c in scope.costs),
        aliases=scope.aliases,
        rescales=tuple(
            replace(r, before=resolve(r.before), part=resolve(r.part), over=resolve(r.over))
            for r in scope.rescales
        ),
        program=Program(nodes, values, scope.parameters, scales, example_inputs),
    )


def _list_norms(scope: Scope) -> tuple[Norm, ...]:
    """List each norm once; one that is called twice or shares a parameter folds into no layer."""
    uses = Counter(name for norm in scope.norms for name in norm.tensors)
    alone = [max(uses[name] for name in norm.tensors) == 1 for norm in scope.norms]
    norms = (
        norm if once else replace(norm, layer=None)
        for norm, once in zip(scope.norms, alone, strict=True)
    )
    return tuple(dict.fromkeys(norms))


def _lock_unclear(scope: Scope) -> None:
    """Lock what no rule accounts for: parameters without a role, channels squared."""
    for name, trees in scope.parameter_axes.items():
        for axis, tree in enumerate(map(scope.table.resolve, trees)):
            if (name, axis) not in scope.roles:
                scope.table.lock(tree, f"{name} meets it in a way that no rule describes")
            for atom in _squared(tree):
                scope.table.lock(atom, "it is multiplied with itself along one axis")


def _squared(tree: Tree) -> list[int]:
    """List atoms that lie in two factors of one product."""
    if isinstance(tree, int):
        return []
    children = tree.parts if isinstance(tree, Sum) else tree.factors
    found = [atom for child in children for atom in _squared(child)]
    if isinstance(tree, Product):
        counts = Counter(atom for child in children for atom in set(leaves(child)))
        found += [atom for atom, count in counts.items() if count > 1]
    return found


def _kinds(scope: Scope) -> dict[int, str]:
    """Say which atoms are heads of attention, and which the width inside them."""
    found: dict[int, str] = {}
    for _, what, tree in scope.heads:
        kind = {"heads": "heads", "width": "width", "value width": "width"}.get(what)
        for atom in leaves(scope.table.resolve(tree)) if kind else ():
            found.setdefault(atom, str(kind))
    return found


def _name_groups(scope: Scope, slots: Mapping[int, list[Slot]]) -> list[ChannelGroup]:
    groups = []
    taken: Counter[str] = Counter()
    kinds = _kinds(scope)
    summed = {a for tree in scope.contracted.values() for a in leaves(scope.table.resolve(tree))}
    for atom, rows in slots.items():
        writers = [slot for slot in rows if slot.role == "writer"]
        reasons = list(scope.table.reasons(atom))
        size = scope.table.size[atom]
        if size < 2:
            reasons.append("a single channel")
        if not writers:
            if not reasons:
                reasons.append("no layer writes these channels")
            if all(slot.role == "reader" for slot in rows):
                continue  # the model's own inputs
        elif all(slot.role != "reader" for slot in rows) and not reasons and atom not in summed:
            reasons.append("no layer reads these channels")
        name = (writers or rows)[0].layer
        name += f"#{kinds[atom]}" if atom in kinds else ""
        taken[name] += 1
        name += f"#{taken[name]}" if taken[name] > 1 else ""
        choices = scope.table.choices(atom)
        groups.append(ChannelGroup(atom, name, -1, size, tuple(rows), tuple(reasons), choices))
    return groups
