"""Rules for operators that only move channels: cat, split, view, permute, pad."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

from torch.fx import Node

from intrafuse.graph.axes import UNIT, Product, Sum, Tree
from intrafuse.graph.rules.registry import (
    JOINS,
    PERMUTATIONS,
    SPLITS,
    Axes,
    LockError,
    Scope,
    arguments,
    operator_name,
    register,
)
from intrafuse.graph.rules.views import permutation


@register(*sorted(JOINS))
def cat(scope: Scope, node: Node) -> Axes:
    """Concatenate tensors along a dimension."""
    args = scope.arguments(node)
    tensors: list[Node] = [t for t in args["tensors"] if scope.shape(t) != (0,)]
    dim: int = args["dim"] % len(scope.shape(node))
    first = scope.axes(tensors[0])
    for other in tensors[1:]:
        axes = scope.axes(other)
        scope.unify(first[:dim] + first[dim + 1 :], axes[:dim] + axes[dim + 1 :])
    joined = Sum(tuple(scope.axes(tensor)[dim] for tensor in tensors))
    for tensor in tensors:
        scope.carry(tensor, "shift")  # such as a learned token before the others
    return [*first[:dim], scope.table.resolve(joined), *first[dim + 1 :]]


@register("stack")
def stack(scope: Scope, node: Node) -> Axes:
    """Stack tensors along a new dimension."""
    args = scope.arguments(node)
    dim: int = args["dim"] % len(scope.shape(node))
    first = scope.axes(args["tensors"][0])
    for other in args["tensors"][1:]:
        scope.unify(first, scope.axes(other))
    return [*first[:dim], scope.fixed(len(args["tensors"]), "stacked tensors"), *first[dim:]]


@register("chunk")
def chunk(scope: Scope, node: Node) -> list[Axes]:
    """Divide a dimension into equal parts.

    The parts stay equal when channels are removed, so their channels are coupled by position.
    """
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    parts = len(node.meta["val"])
    size = scope.table.measure(x[dim])
    if size % parts:
        scope.table.lock(x[dim], "chunk divides it into unequal parts")
        return _split(scope, node, x, dim, [int(t.shape[dim]) for t in node.meta["val"]])
    results = _split(scope, node, x, dim, [size // parts] * parts)
    for other in results[1:]:
        scope.table.unify(results[0][dim], other[dim])
    return results


def _split(scope: Scope, node: Node, x: Axes, dim: int, sizes: Sequence[int]) -> list[Axes]:
    parts: list[Axes] = []
    rest = x[dim]
    for size in sizes:
        part, rest = scope.table.cut(rest, size)
        parts.append([*x[:dim], part, *x[dim + 1 :]])
    return parts


@register(*sorted(SPLITS - {"chunk"}))
def split(scope: Scope, node: Node) -> list[Axes]:
    """Divide a dimension at positions that the code gives as numbers."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    results = _split(scope, node, x, dim, [int(t.shape[dim]) for t in node.meta["val"]])
    for i, part in enumerate(results):
        scope.literal(x[dim], node, i, dim, part=part[dim])
    size = args.get("split_size")
    if isinstance(size, int) and scope.table.measure(x[dim]) == size * len(results):
        for other in results[1:]:  # one number sets all sizes: the parts stay equal
            scope.table.unify(results[0][dim], other[dim])
    return results


@register("unbind")
def unbind(scope: Scope, node: Node) -> list[Axes]:
    """Return each position of a dimension as a tensor."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    scope.table.lock(x[dim], "it is taken apart position by position")
    return [x[:dim] + x[dim + 1 :] for _ in node.meta["val"]]


@register("select")
def select(scope: Scope, node: Node) -> Axes:
    """Take one position of a dimension."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    scope.table.lock(x[dim], "one of its positions is selected by number")
    return x[:dim] + x[dim + 1 :]


@register("slice", "narrow")
def slice_(scope: Scope, node: Node) -> Axes:
    """Take a range of a dimension; its ends are numbers in the code."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    size = scope.table.measure(x[dim])
    start, stop, step = slice_range(node, size)
    if (start, stop, step) == (0, size, 1):
        return x
    if step == 1:
        before, rest = scope.table.cut(x[dim], start)
        part, _ = scope.table.cut(rest, max(stop - start, 0))
        scope.literal(x[dim], node, dim, part=part)
        scope.begin(node, x[dim], before, dim)
    elif stop == size and size % step == 0 and start < step:  # one of every `step` positions
        factors = scope.table.factor(x[dim], (size // step, step))
        if factors is None:
            raise LockError("its positions cannot be divided by its step")
        part = factors[0]
        scope.table.lock(factors[1], "one of its positions is selected by number")
        scope.literal(x[dim], node, dim, part=part)
    else:
        scope.table.lock(x[dim], f"slice takes its size as a number{scope.where(node)}")
        part = scope.fixed(len(range(start, stop, step)), "strided slice")
    return [*x[:dim], part, *x[dim + 1 :]]


def slice_range(node: Node, size: int) -> tuple[int, int, int]:
    """Return start, stop and step of a slice along an axis of the given size."""
    args = arguments(node)
    if operator_name(node) == "narrow":
        start = args["start"] + (size if args["start"] < 0 else 0)
        return start, start + args["length"], 1
    return slice(args["start"], args["end"], args["step"]).indices(size)


@register("pad", "constant_pad_nd")
def pad(scope: Scope, node: Node) -> Axes:
    """Add positions before and after; they are locked, because their number is in the code."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    amounts = args["pad"]
    shape = scope.shape(node)
    for back in range(1, len(amounts) // 2 + 1):
        before, after = amounts[2 * back - 2 : 2 * back]
        if before == after == 0:
            continue
        tree = x[-back]
        if scope.is_fixed(tree) or args.get("mode", "constant") != "constant":
            scope.table.lock(tree, "padded from its own values")
            x[-back] = scope.fixed(shape[len(shape) - back], "padded")
            continue
        if before < 0 or after < 0:
            raise LockError("negative padding")
        constant = "padding of a size that the code holds as a number"
        x[-back] = scope.table.resolve(
            Sum((scope.fixed(before, constant), tree, scope.fixed(after, constant)))
        )
    return x


@register("flatten")
def flatten(scope: Scope, node: Node) -> Axes:
    """Join adjacent dimensions into one."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    if not x:
        return [UNIT]
    start, end = args["start_dim"] % len(x), args["end_dim"] % len(x)
    joined = scope.table.resolve(Product(tuple(x[start : end + 1])))
    return [*x[:start], joined, *x[end + 1 :]]


@register("view", "reshape", "_unsafe_view", "unflatten")
def view(scope: Scope, node: Node) -> Axes:
    """Reshape; sizes that are given as numbers are recorded as literals."""
    args = scope.arguments(node)
    shape = scope.shape(node)
    axes = reshape(scope, scope.axes(args["self"]), shape)
    if operator_name(node) == "unflatten":
        first: int = args["dim"] % len(scope.shape(args["self"]))
        numbers: Sequence[int] = args["sizes"]
    else:
        first, numbers = 0, args["size"] if "size" in args else args["shape"]
    for dim, number in enumerate(numbers, first):
        if number != -1 and shape[dim] > 1:
            scope.literal(axes[dim], node, dim)
    return axes


def reshape(scope: Scope, x: Axes, shape: Sequence[int]) -> Axes:
    """Match runs of old dimensions with runs of new ones that have the same number of elements."""
    if 0 in shape:
        raise LockError("empty tensor")
    old_ends: list[int] = list(accumulate(map(scope.table.measure, x), mul))
    result: Axes = []
    old = new = 0
    while new < len(shape):
        start, done = new, prod(shape[:new])
        total = done * shape[new]
        new += 1
        first = old
        while old < len(x) and (old_ends[old] <= total) and total % old_ends[old] == 0:
            old += 1
        reached = old_ends[old - 1] if old else 1
        while reached != total:  # the runs end at different positions: extend them
            if reached < total:
                old += 1
            else:
                total *= shape[new]
                new += 1
            reached = old_ends[old - 1]
        result += _regroup(scope, x[first:old], shape[start:new])
    return result


def _regroup(scope: Scope, run: Axes, sizes: Sequence[int]) -> Axes:
    joined: Tree = scope.table.resolve(Product(tuple(run)))
    factors = scope.table.factor(joined, sizes)
    if factors is None:
        reason = "it is reshaped across its structure"
        scope.table.lock(joined, reason)
        return [scope.fixed(n, reason) for n in sizes]
    return [scope.table.resolve(tree) for tree in factors]


@register(*PERMUTATIONS)
def permute(scope: Scope, node: Node) -> Axes:
    """Reorder dimensions."""
    x = scope.axes(node.all_input_nodes[0])
    return [x[dim] for dim in permutation(node)]


@register("unsqueeze")
def unsqueeze(scope: Scope, node: Node) -> Axes:
    """Insert a dimension of size 1."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % (len(x) + 1)
    return [*x[:dim], UNIT, *x[dim:]]


@register("squeeze")
def squeeze(scope: Scope, node: Node) -> Axes:
    """Drop dimensions of size 1; lock other named ones, which pruning could make size 1."""
    args = scope.arguments(node)
    x, shape = scope.axes(args["self"]), scope.shape(args["self"])
    wanted = args.get("dim", range(len(x)))
    wanted = [wanted] if isinstance(wanted, int) else wanted
    dropped = {dim % len(x) for dim in wanted if shape[dim] == 1}
    for dim in wanted:
        if shape[dim] != 1:
            scope.table.lock(x[dim], "squeeze would drop it at size 1")
    return [tree for dim, tree in enumerate(x) if dim not in dropped]


@register("expand", "expand_as", "broadcast_to")
def expand(scope: Scope, node: Node) -> Axes:
    """Repeat dimensions of size 1."""
    args = scope.arguments(node)
    x, shape = scope.axes(args["self"]), scope.shape(node)
    old = scope.shape(args["self"])
    other = scope.axes(args["other"]) if "other" in args else None
    result: Axes = []
    for dim, size in enumerate(shape):
        back = dim - len(shape) + len(x)
        kept = back >= 0 and (old[back] == size)
        if other is not None:
            if kept:
                scope.table.unify(x[back], other[dim])
            result.append(other[dim])
        elif kept:
            if args["size"][dim] != -1 and size > 1:
                scope.literal(x[back], node, dim)
            result.append(x[back])
        else:
            result.append(scope.table.atom(size))
            scope.literal(result[-1], node, dim)
    return result


@register("getitem")
def getitem(scope: Scope, node: Node) -> Axes:
    """Return one result of an operator with several results."""
    (source,) = node.all_input_nodes
    return scope.values[source][node.args[1]]
