"""Rules for sums over channels, including lengths and distances.

A zero channel adds nothing to a sum. So channels may be removed if they are zero when the weights
that write them are zero; other channels are locked. Combining channels would change the sum, so
they may not be combined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from intrafuse.graph.axes import UNIT, Product, Tree
from intrafuse.graph.export import CONSTANT
from intrafuse.graph.rules.pointwise import broadcast
from intrafuse.graph.rules.reduce import reduce
from intrafuse.graph.rules.registry import Axes, LockError, Scope, operator_name, register
from intrafuse.graph.rules.silent import is_silent

__all__ = ["ADDED"]

ADDED = "its channels are added up"
EPS = 1e-6  # the default number that `pairwise_distance` adds to each difference


def _add_up(scope: Scope, node: Node, operands: Sequence[Node], trees: Iterable[Tree]) -> None:
    """Let channels be removed if they are zero without their weights; lock the others.

    A sum over a weight locks the weight: if the weight is divided by the sum, a filter that loses
    inputs changes its scale.
    """
    summed: list[Tree] = []
    given = any(_is_activation(scope, x) for x in operands)
    for operand in operands if given else ():
        scope.carry(operand, "shift")  # such as prototypes in a distance
    for tree in trees:
        free = scope.free_atoms(tree) if given else []
        if free and all(is_silent(scope, x, {atom}) for x in operands for atom in free):
            scope.table.choose(tree, ADDED)
            summed.append(tree)
        else:
            scope.table.lock(tree, f"{operator_name(node)} is taken over it")
    if summed:
        scope.contracted[node] = Product(tuple(summed))


def _is_activation(scope: Scope, node: Node) -> bool:
    """Tell whether a tensor is computed from an input of the model."""
    waiting, seen = [node], {node}
    while waiting:
        top = waiting.pop()
        if top.op == "placeholder" and top not in scope.parameters and CONSTANT not in top.meta:
            return True
        new = [source for source in top.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return False


def _dimensions(given: int | Sequence[int] | None, rank: int) -> list[int]:
    dims = range(rank) if given is None or given == [] else given
    return sorted({dim % max(rank, 1) for dim in ([dims] if isinstance(dims, int) else dims)})


def _reduced(x: Axes, dims: Sequence[int], keep: bool) -> Axes:
    return [UNIT if dim in dims else t for dim, t in enumerate(x) if keep or dim not in dims]


@register("sum")
def total(scope: Scope, node: Node) -> Axes:
    """Sum over dimensions."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dims = _dimensions(args.get("dim"), len(x))
    _add_up(scope, node, [args["self"]], [x[dim] for dim in dims])
    return _reduced(x, dims, args.get("keepdim", False))


@register("linalg_vector_norm", "norm", "linalg_norm", "linalg_matrix_norm")
def length(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Compute a p-norm: the root of a sum of powers, or the maximum if p is infinity."""
    args = scope.arguments(node)
    x = scope.axes(node.all_input_nodes[0])
    order = args.get("ord", args.get("p", 2))
    dims = _dimensions(args.get("dim"), len(x))
    if operator_name(node).startswith("linalg") and not operator_name(node).endswith("vector_norm"):
        matrix = operator_name(node) == "linalg_matrix_norm" or order is not None
        if order in (None, "fro") or (len(dims) == 1 and not matrix):
            order = 2
        elif len(dims) == 2 or isinstance(order, str):
            raise LockError("it is the norm of a matrix")
    if order is not None and order <= 0:
        return reduce(scope, node)
    _add_up(scope, node, [node.all_input_nodes[0]], [x[dim] for dim in dims])
    return _reduced(x, dims, args.get("keepdim", False))


@register("cosine_similarity")
def cosine_similarity(scope: Scope, node: Node) -> Axes:
    """Divide the dot product of two vectors by their lengths."""
    args = scope.arguments(node)
    return _compare(scope, node, args["x1"], args["x2"], args["dim"])


@register("pairwise_distance")
def pairwise_distance(scope: Scope, node: Node) -> Axes:
    """Compute the length of the difference of two tensors along the last dimension."""
    args = scope.arguments(node)
    added = args["eps"] == 0 or (args["eps"] <= EPS and args["p"] >= 2)
    if args["p"] <= 0 or not added:
        raise LockError("the number that it adds to each difference is not negligible")
    axes = _compare(scope, node, args["x1"], args["x2"], -1)
    return [*axes, UNIT] if args["keepdim"] else axes


def _compare(scope: Scope, node: Node, a: Node, b: Node, dim: int) -> Axes:
    axes = broadcast(scope, [a, b], max(len(scope.shape(x)) for x in (a, b)))
    dim %= len(axes)
    _add_up(scope, node, [a, b], [axes[dim]])
    return [*axes[:dim], *axes[dim + 1 :]]


@register("dist")
def dist(scope: Scope, node: Node) -> Axes:
    """Compute the length of the difference of two tensors over all dimensions."""
    args = scope.arguments(node)
    operands = [args["self"], args["other"]]
    if args["p"] <= 0:
        raise LockError("its result depends on the number of channels")
    _add_up(scope, node, operands, broadcast(scope, operands, len(scope.shape(args["self"]))))
    return []


@register("cdist")
def cdist(scope: Scope, node: Node) -> Axes:
    """Compute the distance of each row of one tensor to each row of another."""
    args = scope.arguments(node)
    one, two = scope.axes(args["x1"]), scope.axes(args["x2"])
    if args["p"] <= 0 or len(one) != len(two):
        raise LockError("its result depends on the number of channels")
    scope.unify(one[:-2], two[:-2])
    scope.table.unify(one[-1], two[-1])
    _add_up(scope, node, [args["x1"], args["x2"]], [scope.axes(args["x1"])[-1]])
    return [*scope.axes(args["x1"])[:-1], scope.axes(args["x2"])[-2]]
