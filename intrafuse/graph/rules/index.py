"""Rules for operators that address positions by number: index, gather, roll, repeat."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from intrafuse.graph.axes import UNIT, Product
from intrafuse.graph.rules.pointwise import broadcast
from intrafuse.graph.rules.registry import Axes, LockError, Scope, operator_name, register

NUMBERED = "its positions are taken by number"


@register("index", "_unsafe_index")
def index(scope: Scope, node: Node) -> Axes:
    """Index some dimensions with tensors of numbers; the other dimensions pass unchanged."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    wanted: list[Node | None] = [*args["indices"]]
    numbers = {dim: tensor for dim, tensor in enumerate(wanted) if tensor is not None}
    if any(tensor.meta["val"].dtype.itemsize == 1 for tensor in numbers.values()):
        raise LockError("the size of its result depends on a mask")
    for dim in numbers:
        scope.table.lock(x[dim], NUMBERED)
    rest = [tree for dim, tree in enumerate(x) if dim not in numbers]
    new = broadcast(scope, [*numbers.values()], len(scope.shape(node)) - len(rest))
    given = [*numbers]
    together = given == list(range(given[0], given[-1] + 1))
    at = given[0] if together else 0
    return [*rest[:at], *new, *rest[at:]]


@register("gather", "take_along_dim")
def gather(scope: Scope, node: Node) -> Axes:
    """Index one dimension with numbers for each position of the other dimensions."""
    args = scope.arguments(node)
    x, numbers = scope.axes(args["self"]), scope.axes(args.get("index") or args["indices"])
    if args["dim"] is None or len(x) != len(numbers):
        raise LockError("it takes positions of all dimensions at once")
    dim: int = args["dim"] % len(x)
    scope.table.lock(x[dim], NUMBERED)
    for other in range(len(x)):
        if other != dim:
            scope.table.unify(x[other], numbers[other])
    return [scope.table.resolve(tree) for tree in numbers]


@register("index_select")
def index_select(scope: Scope, node: Node) -> Axes:
    """Index one dimension with a list of numbers."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    scope.table.lock(x[dim], NUMBERED)
    return [*x[:dim], *scope.axes(args["index"]), *x[dim + 1 :]]


@register("roll")
def roll(scope: Scope, node: Node) -> Axes:
    """Shift positions along dimensions by a number."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dims: Sequence[int] = args["dims"] or range(len(x))
    for dim in dims:
        scope.table.lock(x[dim], "roll moves its positions by a number")
    return scope.axes(args["self"])


@register("repeat", "tile")
def repeat(scope: Scope, node: Node) -> Axes:
    """Concatenate copies of a tensor."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    counts = args["repeats" if operator_name(node) == "repeat" else "dims"]
    counts = [1] * (len(x) - len(counts)) + list(counts)
    x = [UNIT] * (len(counts) - len(x)) + x
    result: Axes = []
    for tree, count in zip(x, counts, strict=True):
        if count == 1:
            result.append(tree)
        elif scope.table.measure(tree) == 1:
            result.append(scope.table.atom(count))
            scope.literal(result[-1], node, len(result) - 1)
        else:
            result.append(scope.table.resolve(Product((scope.fixed(count, "copies"), tree))))
    return result


@register("repeat_interleave")
def repeat_interleave(scope: Scope, node: Node) -> Axes:
    """Repeat each position of a dimension."""
    args = scope.arguments(node)
    if not isinstance(args.get("repeats"), int) or args["dim"] is None:
        raise LockError("the size of its result depends on a tensor")
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    copies = scope.fixed(args["repeats"], "copies")
    return [*x[:dim], scope.table.resolve(Product((x[dim], copies))), *x[dim + 1 :]]


@register("index_add", "index_copy", "index_fill")
def index_add(scope: Scope, node: Node) -> Axes:
    """Change the positions of one dimension that a list of numbers names."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    scope.table.lock(x[dim], NUMBERED)
    source = args.get("source")
    for other, tree in enumerate(scope.axes(source) if isinstance(source, Node) else ()):
        if other == dim:
            scope.table.lock(tree, NUMBERED)
        else:
            scope.table.unify(x[other], tree)
    return scope.axes(args["self"])


@register("scatter", "scatter_add", "scatter_reduce")
def scatter(scope: Scope, node: Node) -> Axes:
    """Change positions of one dimension, with numbers for each position of the others."""
    args = scope.arguments(node)
    x, numbers = scope.axes(args["self"]), scope.axes(args["index"])
    dim: int = args["dim"] % len(x)
    others = [numbers, *([scope.axes(args["src"])] if isinstance(args.get("src"), Node) else [])]
    for axes in others:
        for other, tree in enumerate(axes):
            if other == dim:
                scope.table.lock(tree, NUMBERED)
            else:
                scope.table.unify(x[other], tree)  # locks both axes if there are fewer numbers
    scope.table.lock(x[dim], NUMBERED)
    return scope.axes(args["self"])
