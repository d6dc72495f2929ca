"""Rules for layers with parameters: convolution, linear, normalization, PReLU, embedding."""

from __future__ import annotations

from math import prod

from torch import nn
from torch.fx import Node

from intrafuse.graph.axes import Tree
from intrafuse.graph.groups import Kind, Layer, Norm, Role
from intrafuse.graph.rules.computed import INSIDE_GROUP, grouped, layer_of_computed
from intrafuse.graph.rules.registry import (
    FOLLOWING,
    Axes,
    Convolution,
    LockError,
    Scope,
    operator_name,
    register,
)
from intrafuse.graph.rules.views import parameter_pieces, parameter_view

PRODUCTS = frozenset("matmul mm bmm mv addmm baddbmm einsum dot vdot inner tensordot".split())
# Attributes of torch.nn.MultiheadAttention that hold the widths of its keys and values.
INPUT_WIDTHS = {"k_proj_weight": "kdim", "v_proj_weight": "vdim"}
TRAINING = "batch norm takes its statistics over it"
STANDARDISED = f"{TRAINING}, on weights (store them as it gives them, in a plain layer, first)"


def declare(
    scope: Scope, node: Node, weight: str, bias: str | None, axes: tuple[int, int], out: Tree
) -> str | None:
    """Record a layer and return the name of its bias, also of a bias that it lacks but could take.

    A module can take a new bias if torch's own code runs it, but not if the model's code computes
    the product by hand.
    """
    name = weight.rpartition(".")[0]
    module = scope.model.get_submodule(name)
    plain = isinstance(module, nn.Linear | Convolution) and weight.endswith(".weight")
    plain &= operator_name(node) not in PRODUCTS
    if bias is None and plain and module.bias is None:
        bias = f"{name}.bias"
        scope.parameter_axes.setdefault(bias, [out])
    layer = Layer(name, operator_name(node), weight, bias, *axes)
    scope.layers.setdefault(weight, layer)  # a shared weight keeps the bias of the first call
    return bias


@register("linear")
def linear(scope: Scope, node: Node) -> Axes:
    """y[..., o] = sum_i W[o, i] x[..., i] + b[o]."""
    args = scope.arguments(node)
    *rest, channels = scope.axes(args["input"])
    if parameter_view(scope, args["weight"]) is None:
        return [*rest, layer_of_computed(scope, node, channels, 1)]
    if args["weight"] not in scope.parameters or args["bias"] not in (None, *scope.parameters):
        return [*rest, _part_of_linear(scope, node, channels)]
    weight = scope.parameter(args["weight"], "weight")
    bias = scope.optional_parameter(args["bias"], "bias")
    rows, columns = scope.axes(args["weight"])
    scope.table.unify(columns, channels)
    if args["bias"] is not None:
        scope.table.unify(rows, scope.axes(args["bias"])[0])
    scope.use(weight, 1, "reader", "weight")
    scope.use(weight, 0, "writer", "weight")
    scope.use(declare(scope, node, weight, bias, (0, 1), rows), 0, "writer", "bias")
    scope.attribute(weight, "out_features", rows)
    scope.attribute(weight, "in_features", columns)
    scope.cost(node, weight, scope.positions(node, scope.table.measure(rows)), rows, columns)
    return [*rest, rows]


def _part_of_linear(scope: Scope, node: Node, channels: Tree) -> Tree:
    """Couple a linear map whose weight or bias is part of a parameter, as in packed attention.

    A bias may also be a concatenation of several parameters and buffers.
    """
    args = scope.arguments(node)
    rows, columns = scope.axes(args["weight"])
    view = parameter_view(scope, args["weight"])
    if view is None or None in view[1]:
        raise LockError("its weight is computed, not a parameter")
    weight, axes = view
    roles: tuple[Role, Role] = ("writer", "reader")
    for axis, role in zip(axes, roles, strict=True):
        assert axis is not None
        scope.use(weight, axis, role, "weight")
    if args["bias"] is not None:
        pieces = parameter_pieces(scope, args["bias"])
        if pieces is None:
            raise LockError("its bias is computed, not a parameter")
        scope.table.unify(rows, scope.axes(args["bias"])[0])
        for piece in pieces:
            if scope.roles.get((piece.parameter, piece.axis)) == ("carrier", "shift"):
                del scope.roles[piece.parameter, piece.axis]  # `cat` had set this role
            scope.use(piece.parameter, piece.axis, "writer", "bias")
    scope.table.unify(columns, channels)
    follower = INPUT_WIDTHS.get(weight.rpartition(".")[2])
    if follower is not None:
        scope.attribute(weight, follower, columns)
    if args["weight"] in scope.parameters:
        scope.attribute(weight, "out_features", rows)
        scope.attribute(weight, "in_features", columns)
    scope.cost(node, weight, scope.positions(node, scope.table.measure(rows)), rows, columns)
    return rows


def _convolution(scope: Scope, node: Node, spatial: int, transposed: bool) -> Axes:
    args = scope.arguments(node)
    x = scope.axes(args["input"])
    at = len(x) - spatial - 1  # the channel dimension; an unbatched input has no axis before it
    if at == 0:
        scope.batch = 1  # an unbatched input: the first dimension holds channels, not samples
    for tree in x[at + 1 :]:
        scope.table.lock(tree, "spatial")
    positions = [scope.fixed(n, "spatial") for n in scope.shape(node)[at + 1 :]]
    reader, writer = (0, 1) if transposed else (1, 0)
    if args["weight"] not in scope.parameters:
        return [*x[:at], layer_of_computed(scope, node, x[at], reader), *positions]
    weight = scope.parameter(args["weight"], "weight")
    bias = scope.optional_parameter(args["bias"], "bias")
    w, groups = scope.axes(args["weight"]), args["groups"]
    if groups == 1:
        scope.table.unify(w[reader], x[at])
        out = w[writer]
        scope.use(weight, reader, "reader", "weight")
        scope.use(weight, writer, "writer", "weight")
        bias = declare(scope, node, weight, bias, (writer, reader), out)
        scope.use(bias, 0, "writer", "bias")
    else:
        which, out = grouped(scope, x[at], w, groups, transposed)
        if isinstance(scope.owner(weight), FOLLOWING):
            scope.attribute(weight, "groups", which, needed=True)
        else:
            scope.literal(which, node)
        scope.use(weight, 0, "carrier", "scale")
        bias = declare(scope, node, weight, bias, (writer, reader), out)
        scope.use(bias, 0, "carrier", "shift")
    if args["bias"] is not None:
        scope.table.unify(out, scope.axes(args["bias"])[0])
    scope.attribute(weight, "in_channels", x[at])
    scope.attribute(weight, "out_channels", out)
    w = scope.axes(args["weight"])
    counted = args["input"] if transposed else node
    times = scope.positions(counted, scope.table.measure(x[at] if transposed else out))
    scope.cost(node, weight, times * prod(scope.shape(args["weight"])[2:]), w[0], w[1])
    return [*x[:at], out, *positions]


@register("conv1d", "conv2d", "conv3d")
def convolution(scope: Scope, node: Node) -> Axes:
    """Convolve with a weight (outputs, inputs / groups, kernel...)."""
    return _convolution(scope, node, int(operator_name(node)[4]), False)


@register("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(scope: Scope, node: Node) -> Axes:
    """Transposed convolution with a weight (inputs, outputs / groups, kernel...)."""
    return _convolution(scope, node, int(operator_name(node)[14]), True)


@register("batch_norm")
def batch_norm(scope: Scope, node: Node) -> Axes:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias on dimension 1."""
    args = scope.arguments(node)
    x = scope.axes(args["input"])
    names: dict[str, str | None] = {}
    if args["training"]:
        reason = STANDARDISED if args["input"] in scope.origins else TRAINING
        for tree in (x[0], *x[2:]):
            scope.table.lock(tree, reason)
    parts: tuple[tuple[str, Kind], ...] = (
        ("weight", "scale"),
        ("bias", "shift"),
        ("running_mean", "mean"),
        ("running_var", "variance"),
    )
    given = [args[argument] for argument, _ in parts if args[argument] is not None]
    for argument, kind in parts:
        name = names[argument] = scope.parameters.get(args[argument])
        if args[argument] is not None:
            scope.table.unify(x[1], scope.axes(args[argument])[0])
        if name is not None:
            scope.use(name, 0, "carrier", kind)
            scope.attribute(name, "num_features", x[1])
    plain = all(tensor in scope.parameters for tensor in given)  # nothing is computed
    if plain and names["running_mean"] and names["running_var"] and not args["training"]:
        scope.norms.append(
            Norm(
                names["running_mean"].rpartition(".")[0],
                names["weight"],
                names["bias"],
                names["running_mean"],
                names["running_var"],
                args["eps"],
                _layer_before(scope, args["input"]),
            )
        )
    return x


def _layer_before(scope: Scope, node: Node) -> str | None:
    """Name the weight of the layer that feeds only this norm, if the norm can fold into it."""
    if operator_name(node) == "getitem" or len(node.users) != 1 or node.op != "call_function":
        return None
    args = scope.arguments(node)
    weight, bias = args.get("weight"), args.get("bias")
    if not isinstance(weight, Node) or scope.uses(weight) != 1:
        return None
    if isinstance(bias, Node) and scope.uses(bias) != 1:
        return None
    if len(scope.shape(node)) != len(scope.shape(weight)):
        return None  # the norm's dimension 1 does not hold the layer's outputs
    layer = scope.layers.get(scope.parameters.get(weight, ""))
    if layer is None or layer.operator != operator_name(node) or layer.bias is None:
        return None
    return layer.weight


@register("prelu")
def prelu(scope: Scope, node: Node) -> Axes:
    """Multiply negative values by one slope, or by one slope per channel."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    weight = scope.parameter(args["weight"], "weight")
    (slope,) = scope.axes(args["weight"])
    if scope.table.measure(slope) > 1:
        scope.table.unify(slope, x[1 if len(x) > 1 else 0])
        scope.use(weight, 0, "carrier", "scale")
        scope.attribute(weight, "num_parameters", slope)
    return x


@register("group_norm")
def group_norm(scope: Scope, node: Node) -> Axes:
    """Normalize within groups of channels; only whole groups can be removed."""
    args = scope.arguments(node)
    x = scope.axes(args["input"])
    groups = args["num_groups"]
    split = scope.table.factor(x[1], (groups, scope.table.measure(x[1]) // groups))
    if split is None:
        raise LockError("its input cannot be divided into the groups of the norm")
    scope.table.lock(split[1], INSIDE_GROUP)
    for tree in x[2:]:
        scope.table.lock(tree, "group_norm takes its statistics over it")
    owner = args["weight"] if args["weight"] is not None else args["bias"]
    if owner is None:
        scope.table.lock(x[1], "group norm without parameters")
    else:
        name = scope.parameter(owner, "weight")
        scope.attribute(name, "num_groups", split[0], needed=True)
        scope.attribute(name, "num_channels", x[1])
    parts: tuple[tuple[str, Kind], ...] = (("weight", "scale"), ("bias", "shift"))
    for argument, kind in parts:
        if args[argument] is not None:
            scope.table.unify(x[1], scope.axes(args[argument])[0])
            scope.use(scope.parameter(args[argument], argument), 0, "carrier", kind)
    return scope.axes(args["input"])


def _rows(scope: Scope, node: Node) -> Tree:
    """Return the columns of an embedding's weight as written channels; lock its vocabulary."""
    source = scope.arguments(node)["weight"]
    weight = scope.parameter(source, "weight")
    rows, columns = scope.axes(source)
    scope.table.lock(rows, "vocabulary of an embedding")
    scope.use(weight, 1, "writer", "weight")
    scope.attribute(weight, "embedding_dim", columns)
    return columns


@register("embedding")
def embedding(scope: Scope, node: Node) -> Axes:
    """Look up rows of the weight. Dimension 0, the vocabulary, is locked."""
    columns = _rows(scope, node)
    return [*scope.axes(scope.arguments(node)["indices"]), columns]


@register("embedding_bag")
def embedding_bag(scope: Scope, node: Node) -> list[Axes]:
    """Reduce rows of the weight to their sum, mean or maximum, for each bag of indices."""
    columns = _rows(scope, node)
    bags, *others = node.meta["val"]
    fixed = [[scope.fixed(int(n), "bags") for n in other.shape] for other in others]
    if scope.arguments(node)["mode"] == 2 and len(fixed[-1]) == 2:  # argmax per channel
        fixed[-1][1] = columns
    return [[scope.fixed(int(bags.shape[0]), "bags"), columns], *fixed]
