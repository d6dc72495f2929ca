"""Numbers in the code that follow a size: attention divides by the root of its query width.

When the width shrinks, the code's number changes, and with it the result for the remaining
channels. To correct this, the layer that writes the queries takes the ratio into its weights. This
works if only linear operators without constant terms lie between the layer and the number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from intrafuse.graph.axes import Product, Sum, Tree, leaves
from intrafuse.graph.groups import Rescale
from intrafuse.graph.rules.registry import (
    CHECKS,
    CUTS,
    DROPOUTS,
    JOINS,
    SPLITS,
    VIEWS,
    Scope,
    compute,
    operator_name,
)
from intrafuse.graph.rules.views import parameter_pieces, parameter_view
from intrafuse.graph.typed import sorted_values

__all__ = ["follow_size"]

MOVES = VIEWS | SPLITS | DROPOUTS | {"unbind", "getitem"}
PARTS = CUTS | {"getitem"}
LAYERS = frozenset(("linear", "addmm", "matmul", "mm", "conv1d", "conv2d"))


def follow_size(scope: Scope, node: Node, source: Node, size: Tree, exponent: float) -> None:
    """Rescale the layer that writes a tensor, to correct a number that follows a size, or lock it.

    Args:
        scope: the trace.
        node: the operator with the number.
        source: the tensor that the number multiplies, linearly.
        size: the tree of the size d.
        exponent: if m of d channels remain, the layer is multiplied by (m / d) ** exponent.
    """
    found = _writer(scope, node, source, size)
    scaled = None if found is None else _scaled(scope, *found)
    if scaled is None:
        scope.table.lock(size, "its size enters the scale of attention")
        return
    scope.rescales += [
        Rescale(name, bias, axis, before, part, size, exponent)
        for name, bias, axis, before, part in scaled
    ]


def _scaled(
    scope: Scope, layer: Node, before: Tree, part: Tree
) -> list[tuple[str, str | None, int, Tree, Tree]] | None:
    """List the parameters that scale a range of a layer's outputs, with the range in each."""
    name, axis = _output(scope, layer)
    args = scope.arguments(layer)
    given = args.get("bias", args["self"] if operator_name(layer) == "addmm" else None)
    if given is None or given in scope.parameters:
        known = scope.layers.get(name)
        own = known.bias if known else None
        bias = own if given is None else scope.parameters[given]
        return [(name, bias, axis, before, part)]
    found: list[tuple[str, str | None, int, Tree, Tree]] = [(name, None, axis, before, part)]
    start = scope.table.measure(before)
    stop = start + scope.table.measure(part)
    for piece in parameter_pieces(scope, given) or ():
        if piece.start >= stop or piece.start + piece.size <= start:
            continue
        tree = scope.parameter_axes[piece.parameter][piece.axis]
        whole = scope.table.measure(tree) == piece.size
        if not whole or piece.start < start or piece.start + piece.size > stop:
            return None
        found.append((piece.parameter, None, piece.axis, Sum(()), tree))
    return found if len(found) > 1 else None


def _writer(scope: Scope, node: Node, source: Node, size: Tree) -> tuple[Node, Tree, Tree] | None:
    """Find the layer that writes a tensor linearly, and the range of outputs in the tensor."""
    chain = list(_back(scope, source, size))
    if not chain or not _is_layer(scope, chain[-1]):
        return None
    layer = chain[-1]
    weight = _weight(scope, layer)
    while weight not in scope.parameters:  # a view, such as a transposed weight
        if len(weight.users) != 1:
            return None
        weight = weight.all_input_nodes[0]
    _, axis = _output(scope, layer)
    whole = axis >= 0 and scope.shape(weight)[axis] == scope.shape(layer)[_dimension(layer)]
    if scope.uses(weight) != 1 or not whole:
        return None
    dim = _dimension(layer)
    whole = scope.axes(layer)[dim]
    if _only_leads_to(scope, layer, node):
        return layer, Sum(()), whole
    for i in range(len(chain) - 2, -1, -1):
        start = chain[i]
        if operator_name(start) in PARTS and _only_leads_to(scope, start, node):
            rows = _rows(scope, chain[i:], dim)
            parts = None if rows is None else _range(scope, whole, *rows)
            return None if parts is None else (layer, *parts)
    return None


def _weight(scope: Scope, layer: Node) -> Node:
    args = scope.arguments(layer)
    return next(args[name] for name in ("weight", "mat2", "other") if name in args)


def _is_layer(scope: Scope, node: Node) -> bool:
    """Tell whether an operator multiplies its input by a parameter or a view of one."""
    if operator_name(node) not in LAYERS:
        return False
    return parameter_view(scope, _weight(scope, node)) is not None


def _output(scope: Scope, layer: Node) -> tuple[str, int]:
    """Return a layer's weight name, and its output axis; -1 if there is not exactly one."""
    view = parameter_view(scope, _weight(scope, layer))
    assert view is not None
    roles = {axis: role for (name, axis), (role, _) in scope.roles.items() if name == view[0]}
    axes = [axis for axis, role in roles.items() if role == "writer"]
    return view[0], axes[0] if len(axes) == 1 else -1


def _dimension(layer: Node) -> int:
    return 1 if operator_name(layer).startswith("conv") else -1


def _back(scope: Scope, node: Node, size: Tree) -> Iterator[Node]:
    """Go back from a tensor, along tensors that have the size, to the layer that writes it."""
    wanted = set(leaves(scope.table.resolve(size)))
    while node.op == "call_function":
        yield node
        if _is_layer(scope, node):
            return
        ahead = [
            n for n in node.all_input_nodes
            if n in scope.values and wanted & {a for t in _trees(scope, n) for a in leaves(t)}
            and n.op == "call_function"
        ]  # fmt: skip
        if not ahead:
            return
        node = ahead[0]


def _trees(scope: Scope, node: Node) -> list[Tree]:
    return [*map(scope.table.resolve, scope.trees(node))]


def _only_leads_to(scope: Scope, start: Node, end: Node) -> bool:
    """Tell whether a tensor reaches only one operator, and reaches it linearly."""
    scaled, waiting = {start}, [start]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            if user is end or user in scaled or operator_name(user) in CHECKS:
                continue
            if user.op != "call_function":
                return False
            if _is_linear(user, scaled):
                scaled.add(user)
                seen.discard(user)
                waiting.append(user)
            else:
                seen.add(user)  # its other operands may turn out to be scaled, too
    if seen:
        return False
    operands = [n for n in end.all_input_nodes if n in scaled]
    return len(operands) == 1


def _is_linear(node: Node, scaled: set[Node]) -> bool:
    """Tell whether a factor on the scaled tensors becomes the same factor on the result."""
    name = operator_name(node)
    tensors = node.all_input_nodes
    if name in MOVES or name == "neg":
        return tensors[0] in scaled
    if name in JOINS | {"add", "sub", "stack"}:
        constant = name in ("add", "sub") and len(tensors) < 2
        return all(tensor in scaled for tensor in tensors) and not constant
    if name == "mul":
        return sum(tensor in scaled for tensor in node.args[:2]) == 1
    if name == "div":
        return node.args[0] in scaled and node.args[1] not in scaled
    if name in ("matmul", "bmm"):
        return sum(tensor in scaled for tensor in node.args[:2]) == 1
    return False


def _rows(scope: Scope, chain: list[Node], dim: int) -> tuple[int, int] | None:
    """Find the range of outputs of a layer, at the end of a chain, in its first tensor."""
    shape = scope.shape(chain[-1])
    count = shape[dim]
    line = torch.arange(count).view([-1 if i == dim % len(shape) else 1 for i in range(len(shape))])
    value: Any = line.expand(shape)
    for node in reversed(chain[:-1]):
        if operator_name(node) not in MOVES or len(node.all_input_nodes) != 1:
            return None
        if operator_name(node) == "getitem":
            value = value[node.args[1]]
        else:
            value = compute(node, value)
    rows = sorted_values(value)
    low, high = int(rows[0]), int(rows[-1]) + 1
    return (low, high) if high - low == len(rows) else None


def _range(scope: Scope, tree: Tree, low: int, high: int) -> tuple[Tree, Tree] | None:
    """Return the trees of the positions before a range of an axis and of the range itself."""
    if isinstance(tree, Sum):
        pieces = list(tree.parts)
    elif isinstance(tree, Product) and isinstance(tree.factors[0], int):
        rest = Product(tree.factors[1:])
        if not scope.table.reasons(tree.factors[0]):
            return None
        pieces = [rest] * scope.table.measure(tree.factors[0])
    else:
        return None
    before: list[Tree] = []
    part: list[Tree] = []
    at = 0
    for piece in pieces:
        end = at + scope.table.measure(piece)
        if end <= low:
            before.append(piece)
        elif at >= low and end <= high:
            part.append(piece)
        elif at < high:
            return None
        at = end
    return Sum(tuple(before)), Sum(tuple(part))
