"""Rules for layers whose weight is computed from parameters: weight norm, weight standardization.

The axes of the computed weight show which channels a parameter writes or reads. Axes over which
the weight takes a statistic are locked: a filter that loses inputs would change its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch.fx import Node

from intrafuse.graph.axes import Product, Tree, leaves
from intrafuse.graph.groups import Role
from intrafuse.graph.rules.pointwise import BINARY, PARAMETER_KIND, UNARY
from intrafuse.graph.rules.registry import (
    CHECKS,
    FOLLOWING,
    VIEWS,
    Axes,
    LockError,
    Scope,
    modules_of,
    operator_name,
    register,
)

COMPUTED = "a weight is computed from parameters"
FUNCTION = "a function of a parameter meets its channels"
INSIDE_GROUP = "position inside a group of a grouped operator (whole groups are pruned instead)"


def layer_of_computed(scope: Scope, node: Node, x: Tree, reader: int) -> Tree:
    """Couple a layer that has a computed weight, and return the tree of its outputs.

    Args:
        scope, node: the trace and the layer's operator.
        x: the axis of the input that the layer sums over.
        reader: the axis of the weight, 0 or 1, that holds inputs; the other one holds outputs.
    """
    args, table = scope.arguments(node), scope.table
    if args.get("groups", 1) != 1:
        return _groups_of_computed(scope, node, x, args["groups"], transposed=reader == 0)
    table.unify(scope.axes(args["weight"])[reader], x)
    inputs, out = (scope.axes(args["weight"])[axis] for axis in (reader, 1 - reader))
    if args["bias"] is not None:
        bias = scope.parameter(args["bias"], "bias")
        table.unify(out, scope.axes(args["bias"])[0])
        scope.use(bias, 0, "writer", "bias")
    _claim(scope, args["weight"], {"writer": out, "reader": inputs})
    for tree in (inputs, out):
        table.choose(tree, COMPUTED)
    _follow(scope, node, inputs, out)
    counted = node if reader == 1 else args["input"]
    times = scope.positions(counted, table.measure(out if reader == 1 else x))
    kernel = prod(scope.shape(args["weight"])[2:])
    scope.cost(node, _sources(scope, args["weight"])[0], times * kernel, out, inputs)
    return table.resolve(out)


def _groups_of_computed(
    scope: Scope, node: Node, x: Tree, groups: int, *, transposed: bool
) -> Tree:
    """Couple a grouped convolution with a computed weight; groups are removed as a whole."""
    args, table = scope.arguments(node), scope.table
    which, out = grouped(scope, x, scope.axes(args["weight"]), groups, transposed)
    if args["bias"] is not None:
        table.unify(out, scope.axes(args["bias"])[0])
        scope.use(scope.parameter(args["bias"], "bias"), 0, "carrier", "shift")
    _claim(scope, args["weight"], {"carrier": which})
    table.choose(which, COMPUTED)
    owner = _owner(node)
    if not isinstance(scope.model.get_submodule(owner), FOLLOWING):
        scope.literal(which, node)
    else:
        scope.attribute(f"{owner}.weight", "groups", which, needed=True)
        _follow(scope, node, x, out)
    rows, columns, *kernel = scope.axes(args["weight"])
    times = scope.positions(args["input"] if transposed else node, table.measure(out))
    name = _sources(scope, args["weight"])[0]
    scope.cost(node, name, times * prod(map(table.measure, kernel)), rows, columns)
    return table.resolve(out)


def grouped(
    scope: Scope, channels: Tree, weight: Axes, groups: int, transposed: bool
) -> tuple[Tree, Tree]:
    """Couple the axes of a grouped convolution; return the trees of its groups and outputs."""
    table = scope.table
    side = weight[0]  # (groups x outputs) of a convolution, (groups x inputs) if transposed
    split = table.factor(channels, (groups, table.measure(channels) // groups))
    rows = table.factor(side, (groups, table.measure(side) // groups))
    if split is None or rows is None:
        raise LockError("its input cannot be divided into the groups of the convolution")
    table.unify(split[0], rows[0])
    table.unify(split[1], rows[1] if transposed else weight[1])
    for inside in (split[1], rows[1], weight[1]):
        table.lock(inside, INSIDE_GROUP)
    out = table.resolve(Product((split[0], weight[1]))) if transposed else side
    return split[0], out


def _claim(scope: Scope, weight: Node, sides: Mapping[Role, Tree]) -> None:
    """Record the roles of the parameters that a computed weight depends on."""
    atoms: dict[Role, set[int]] = {
        role: set(leaves(scope.table.resolve(tree))) for role, tree in sides.items()
    }
    for name in _sources(scope, weight):
        for axis, tree in enumerate(scope.parameter_axes[name]):
            own = set(leaves(scope.table.resolve(tree)))
            for role, wanted in atoms.items():
                if own & wanted:
                    scope.roles[name, axis] = (role, "weight")


def _sources(scope: Scope, weight: Node) -> list[str]:
    """List the parameters that a weight is computed from."""
    found: dict[str, None] = {}
    waiting, seen = [weight], {weight}
    while waiting:
        node = waiting.pop()
        if node in scope.parameters:
            found[scope.parameters[node]] = None
        elif node.op == "placeholder" and any(not scope.is_fixed(t) for t in scope.axes(node)):
            raise LockError("its weight is not computed from parameters only")
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    if not scope.trained.intersection(found):
        raise LockError("its weight is computed without any parameter")
    return [*found]


def _follow(scope: Scope, node: Node, inputs: Tree, out: Tree) -> None:
    """Let the size attributes of a layer's module follow its axes."""
    owner = _owner(node)
    if isinstance(scope.model.get_submodule(owner), FOLLOWING):
        for name, tree in (("in_channels", inputs), ("out_channels", out)):
            scope.attribute(f"{owner}.weight", name, tree)


def _owner(node: Node) -> str:
    """Name the module in whose forward an operator was recorded."""
    return next(iter(modules_of(node)), "")


def claim_functions(scope: Scope) -> None:
    """Make parameters that act on channels element by element carriers, whatever the function.

    An example is a decay exp(-exp(a)). Channels may be combined only if the parameter acts by sums
    and products.
    """
    for node, name in scope.parameters.items():
        met = _meetings(scope, node)
        if not met or None in met:
            continue
        plain = all(kind in PARAMETER_KIND for kind in met)
        for axis, tree in enumerate(scope.parameter_axes[name]):
            scope.roles.setdefault((name, axis), ("carrier", "scale" if plain else "function"))
            if not plain:
                scope.table.choose(tree, FUNCTION)


def _meetings(scope: Scope, parameter: Node) -> set[str | None]:
    """Name the operators in which a parameter meets channels; None stands for a non-pointwise one.

    A function of the parameter alone, before it meets channels, adds an empty name.
    """
    found: set[str | None] = set()
    waiting, seen = [parameter], {parameter}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            name = operator_name(user) if user.op == "call_function" else ""
            if name in CHECKS:
                continue
            pointwise = name in UNARY or name in BINARY
            if len(user.all_input_nodes) == 1 and (pointwise or name in VIEWS):
                found |= {""} if pointwise and name not in VIEWS else set()
                waiting += [user] if user not in seen else []
                seen.add(user)
            else:
                found.add(name if pointwise else None)
    return found


@register("_weight_norm")
def weight_norm(scope: Scope, node: Node) -> Axes:
    """Scale directions v to lengths g: one direction for each position of one dimension."""
    args = scope.arguments(node)
    v, g = scope.axes(args["v"]), scope.axes(args["g"])
    dim: int = args["dim"] % len(v)
    scope.table.unify(v[dim], g[dim])
    for other, tree in enumerate(v):
        if other != dim:
            reason = "weight norm takes its norm over it (torch.nn.utils.parametrize."
            scope.table.lock(tree, f"{reason}remove_parametrizations makes it a plain weight)")
    return scope.axes(args["v"])
