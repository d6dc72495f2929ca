"""Rules for layers whose weight is computed from parameters: weight norm, weight standardisation.

The axes of the computed weight say which channels a parameter writes or reads. Channels along
which a statistic of the weight is taken stay: filters that lose inputs would be scaled otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from torch.fx import Node

from intrafuse.graph.axes import Tree, leaves
from intrafuse.graph.groups import Role
from intrafuse.graph.rules.registry import FOLLOWING, Axes, LockError, Scope, register

COMPUTED = "a weight is computed from parameters"


def layer_of_computed(scope: Scope, node: Node, x: Tree, reader: int) -> Tree:
    """Couple a layer with a computed weight, and return its outputs.

    Args:
        scope, node: the trace, and the layer's operator.
        x: the axis of the input that it sums over.
        reader: the axis of the weight that holds inputs; outputs lie along the other of the first
            two.
    """
    args, table = scope.arguments(node), scope.table
    if args.get("groups", 1) != 1:
        raise LockError("its weight is computed, not a parameter, and it works in groups")
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


def _claim(scope: Scope, weight: Node, sides: Mapping[Role, Tree]) -> None:
    """Record what the parameters that a weight is computed from do for the channels on them."""
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
            raise LockError("its weight is computed, and not from parameters alone")
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    if not scope.trained.intersection(found):
        raise LockError("its weight is computed, and from no parameter")
    return [*found]


def _follow(scope: Scope, node: Node, inputs: Tree, out: Tree) -> None:
    """Let the sizes that a layer's module holds follow."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    owner = re.sub(r"@\d+", "", stack[-1]) if stack else ""  # a second call is module@1
    if isinstance(scope.model.get_submodule(owner), FOLLOWING):
        for name, tree in (("in_channels", inputs), ("out_channels", out)):
            scope.attribute(f"{owner}.weight", name, tree)


@register("_weight_norm")
def weight_norm(scope: Scope, node: Node) -> Axes:
    """Scale a direction to a length, for each position of one dimension."""
    args = scope.arguments(node)
    v, g = scope.axes(args["v"]), scope.axes(args["g"])
    dim = args["dim"] % len(v)
    scope.table.unify(v[dim], g[dim])
    for other, tree in enumerate(v):
        if other != dim:
            scope.table.lock(tree, "weight norm takes its norm over it")
    return scope.axes(args["v"])
