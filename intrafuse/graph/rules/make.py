"""Rules for operators that make tensors from sizes, or only check a tensor."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from intrafuse.graph.rules.registry import Axes, Scope, operator_name, register


@register("arange", "linspace", "eye", "tril_indices", "triu_indices", "scalar_tensor", "_tensor")
def count(scope: Scope, node: Node) -> Axes:
    """Make numbers that depend on their positions."""
    return [scope.fixed(n, f"counted by {operator_name(node)}") for n in scope.shape(node)]


@register(
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand",
    "randn",
)  # fmt: skip
def fill(scope: Scope, node: Node) -> Axes:
    """Fill a shape that the code sets."""
    axes: Axes = [scope.table.atom(n) for n in scope.shape(node)]
    for dim, tree in enumerate(axes):
        scope.literal(tree, node, dim)
    return axes


@register("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")
def check(scope: Scope, node: Node) -> Axes:
    """Check a tensor without computing a result."""
    value = node.meta.get("val")
    return scope.axes(node.all_input_nodes[0]) if isinstance(value, Tensor) else []
