"""Rules for norms over channels: layer norm, RMS norm, and RMS norm written by hand.

Such a norm divides by the root of a mean over the channels. If m of n channels remain, the norm
takes the mean over these m, and its weight is multiplied by sqrt(n / m). The channels are then
divided by the same number as if the others were zero (docs/research.md). Layer norm also subtracts
the mean of the remaining channels. Combined channels have other statistics, so channels may be
removed but not combined.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Node

from intrafuse.graph.axes import Sum, Tree
from intrafuse.graph.groups import NORMED, Kind, Rescale
from intrafuse.graph.rules.reduce import reduce
from intrafuse.graph.rules.registry import (
    CASTS,
    CHECKS,
    Axes,
    Scope,
    arguments,
    operator_name,
    register,
)
from intrafuse.graph.rules.views import parameter_view
from intrafuse.graph.typed import is_several

__all__ = ["norm_after", "other_uses"]


@register("layer_norm", "rms_norm")
def layer_norm(scope: Scope, node: Node) -> Axes:
    """Normalize over the last dimension; its channels may be removed but not combined."""
    args = scope.arguments(node)
    x = scope.axes(args["input"])
    normalised = x[len(x) - len(args["normalized_shape"]) :]
    parts: tuple[tuple[str, Kind], ...] = (("weight", "scale"), ("bias", "shift"))
    for argument, kind in parts:
        if args.get(argument) is not None:
            scope.unify(scope.axes(args[argument]), normalised)
            name = scope.parameter(args[argument], argument)
            for axis in range(len(normalised)):
                scope.use(name, axis, "carrier", kind)
    if len(normalised) != 1 or args["weight"] is None:
        why = "several dimensions at once" if len(normalised) != 1 else "it, and has no weight"
        for tree in normalised:
            scope.table.lock(tree, f"{operator_name(node)} takes its statistics over {why}")
        return x
    weight = scope.parameter(args["weight"], "weight")
    _scale(scope, weight, 0, x[-1])
    scope.attribute(weight, "normalized_shape.0", x[-1])
    if not isinstance(scope.owner(weight), nn.LayerNorm | nn.RMSNorm):
        scope.literal(x[-1], node, len(x) - 1)
    return scope.axes(args["input"])


@register("mean")
def mean(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Average over dimensions. Lock their channels, except in an RMS norm written by hand."""
    norm = norm_after(node)
    weight = None if norm is None else _weight_after(scope, norm)
    if weight is None:
        return reduce(scope, node)
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"][0] % len(x)
    _scale(scope, weight[0], weight[1], x[dim], weight[2])
    return [*x[:dim], scope.table.atom(1), *x[dim + 1 :]]


def _scale(scope: Scope, weight: str, axis: int, tree: Tree, offset: float = 0.0) -> None:
    """Rescale the weight of a norm with the number of channels that the norm reduces over."""
    scope.table.choose(tree, NORMED)
    scope.table.unify(scope.parameter_axes[weight][axis], tree)
    scope.normed[weight] += 1
    if scope.normed[weight] == 1:
        scope.rescales.append(Rescale(weight, None, axis, Sum(()), tree, tree, -0.5, offset))


def norm_after(node: Node) -> Node | None:
    """Find the operator that divides a tensor by its own root mean square.

    Args:
        node: the mean over one dimension, with keepdim.

    Returns:
        The product or quotient; None if the mean is used in another way.
    """
    args = arguments(node)
    dims = args.get("dim")
    if not is_several(dims) or len(dims) != 1 or not args.get("keepdim", False):
        return None
    x = args["self"]
    source = _squared(_uncast(x)) if isinstance(x, Node) else None
    if source is None:
        return None
    at, power = node, 1.0
    while True:
        after = _only_user(at)
        name = "" if after is None else operator_name(after)
        if after is None:
            return None
        if name in ("mul", "div"):
            other = [n for n in after.args[:2] if n is not at]
            same = len(other) == 1 and isinstance(other[0], Node) and _uncast(other[0]) is source
            fits = power == -0.5 if name == "mul" else power == 0.5 and after.args[1] is at
            return after if same and fits else None
        if name in ("sqrt", "rsqrt", "reciprocal"):
            power *= {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}[name]
        elif name == "pow" and after.args[0] is at and isinstance(after.args[1], int | float):
            power *= after.args[1]
        elif not (name == "add" and len(after.all_input_nodes) == 1 and power == 1):  # eps
            return None
        at = after


def _squared(node: Node) -> Node | None:
    """Find the tensor that a node squares; None if the node is not a square."""
    name = operator_name(node) if node.op == "call_function" else ""
    first = node.args[0] if node.args else None
    twice = name == "mul" and node.args[1] is first
    if not (name == "square" or twice or (name == "pow" and node.args[1] == 2)):
        return None
    return _uncast(first) if isinstance(first, Node) else None


def _weight_after(scope: Scope, node: Node) -> tuple[str, int, float] | None:
    """Find the only parameter that multiplies a tensor: (name, axis, number added to it)."""
    after = _only_user(node)
    if after is None or operator_name(after) != "mul":
        return None
    for other in (n for n in after.all_input_nodes if n is not node):
        factor, offset = _uncast(other), 0.0
        if operator_name(factor) == "add" and len(factor.all_input_nodes) == 1:
            numbers = [n for n in factor.args if isinstance(n, int | float)]
            if len(numbers) != 1 or factor.kwargs.get("alpha", 1) != 1:
                return None
            factor, offset = _uncast(factor.all_input_nodes[0]), float(numbers[0])
        known = parameter_view(scope, factor)
        axes = [axis for axis in known[1] if axis is not None] if known else []
        if known and known[0] in scope.trained and len(axes) == 1:
            alone = scope.shape(factor)[-1:] == scope.shape(node)[-1:]
            return (known[0], 0, offset) if alone and len(scope.shape(factor)) == 1 else None
    return None


def _uncast(node: Node) -> Node:
    """Go back over operators that change only the dtype."""
    while node.op == "call_function" and operator_name(node) in CASTS:
        node = node.all_input_nodes[0]
    return node


def _only_user(node: Node) -> Node | None:
    """Find the only operator that uses a tensor, after any changes of dtype."""
    while True:
        users = [user for user in node.users if operator_name(user) not in CHECKS]
        if len(users) != 1 or users[0].op != "call_function":
            return None
        if operator_name(users[0]) not in CASTS:
            return users[0]
        node = users[0]


def other_uses(scope: Scope) -> Iterator[str]:
    """List the weights of norms that other operators use, too."""
    for name, calls in sorted(scope.normed.items()):
        users = [u for n, known in scope.parameters.items() if known == name for u in n.users]
        if sum(operator_name(user) not in CHECKS for user in users) != calls:
            yield name
