"""Rules for operators that compute statistics or an order along a dimension."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from intrafuse.graph.groups import Kind
from intrafuse.graph.rules.reduce import reduce
from intrafuse.graph.rules.registry import Axes, Scope, operator_name, register
from intrafuse.graph.typed import is_several

register("var_mean", "std_mean", "argmax", "argmin", "all")(reduce)


@register("instance_norm")
def instance_norm(scope: Scope, node: Node) -> Axes:
    """Normalize each channel by its own statistics, either of the input or running."""
    args = scope.arguments(node)
    x = scope.axes(args["input"])
    for tree in x[2:]:
        scope.table.lock(tree, "instance_norm takes its statistics over it")
    parts: tuple[tuple[str, Kind], ...] = (
        ("weight", "scale"),
        ("bias", "shift"),
        ("running_mean", "mean"),
        ("running_var", "variance"),
    )
    for argument, kind in parts:
        name = scope.optional_parameter(args[argument], argument)
        if name is not None:
            scope.table.unify(x[1], scope.axes(args[argument])[0])
            scope.use(name, 0, "carrier", kind)
            scope.attribute(name, "num_features", x[1])
    return scope.axes(args["input"])


@register("sort", "argsort", "topk", "kthvalue", "cumsum", "cumprod", "logcumsumexp", "flip")
def ordered(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Lock dimensions on whose order of positions the result depends."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dims = args.get("dims", args.get("dim", -1))
    dims = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in dims:
        scope.table.lock(x[dim], f"the order along it matters to {operator_name(node)}")
    x = scope.axes(args["self"])
    value = node.meta["val"]
    tensors: Sequence[Tensor] = value if is_several(value) else [value]
    results: list[Axes] = []
    for tensor in tensors:
        if tensor.dim() < len(x):
            results.append([tree for dim, tree in enumerate(x) if dim not in dims])
        else:
            sizes = enumerate(tensor.shape)
            results.append([scope.fixed(n, "chosen") if d in dims else x[d] for d, n in sizes])
    return results if is_several(value) else results[0]
