"""Rules for operators that act on each element: activations, arithmetic, dropout, copies."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from intrafuse.graph.axes import UNIT
from intrafuse.graph.groups import Kind
from intrafuse.graph.rules.registry import (
    CASTS,
    DROPOUTS,
    LIFTS,
    Axes,
    Scope,
    operator_name,
    register,
)

UNARY = (
    *"relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid "
    "log_sigmoid tanh softplus softsign softshrink hardshrink tanhshrink threshold rrelu "
    "exp log log1p expm1 sqrt rsqrt square abs neg sign sin cos tan atan erf reciprocal floor "
    "ceil round clamp clamp_min clamp_max pow logical_not bitwise_not isnan isinf nan_to_num "
    "zeros_like ones_like full_like rand_like randn_like empty_like fill logit".split(),
    *sorted(CASTS - {"type_as"} | LIFTS | DROPOUTS),
)
BINARY = (
    "add sub rsub mul div floor_divide remainder fmod maximum minimum atan2 where lerp addcmul "
    "addcdiv eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or "
    "masked_fill copysign fmax fmin multiply divide subtract true_divide copy __and__ __or__ "
    "__xor__"
).split()
# The kind of a parameter that meets channels in an operator.
PARAMETER_KIND: dict[str, Kind] = {
    "add": "shift",
    "sub": "shift",
    "mul": "scale",
    "multiply": "scale",
}


@register(*UNARY)
def unary(scope: Scope, node: Node) -> Axes:
    """Act on each element. With a second tensor, such as the exponent of pow, act as `binary`."""
    if sum(isinstance(argument, Node) for argument in node.args) > 1:
        return binary(scope, node)
    return scope.axes(node.all_input_nodes[0])


@register("type_as")
def type_as(scope: Scope, node: Node) -> Axes:
    """Convert to the dtype of another tensor."""
    return scope.axes(node.all_input_nodes[0])


@register(*BINARY)
def binary(scope: Scope, node: Node) -> Axes:
    """Combine tensors element by element, with NumPy's broadcasting."""
    result = broadcast(scope, node.all_input_nodes, len(scope.shape(node)))
    kind = PARAMETER_KIND.get(operator_name(node))
    if kind is not None:
        for operand in node.all_input_nodes:
            scope.carry(operand, kind)
    return [scope.table.resolve(tree) for tree in result]


def broadcast(scope: Scope, operands: Sequence[Node], dimensions: int) -> Axes:
    """Broadcast tensors from the last dimension; dimensions of size 1 are repeated."""
    result: Axes = [UNIT] * dimensions
    sizes = [1] * dimensions
    for operand in operands:
        axes, shape = scope.axes(operand), scope.shape(operand)
        for back in range(1, len(axes) + 1):
            if shape[-back] == 1 and sizes[-back] != 1:
                continue
            if result[-back] == UNIT or sizes[-back] != shape[-back]:
                result[-back], sizes[-back] = axes[-back], shape[-back]
            else:
                scope.table.unify(result[-back], axes[-back])
    return [scope.table.resolve(tree) for tree in result]


@register("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(scope: Scope, node: Node) -> Axes:
    """Normalize along one dimension, which is locked because its size affects the result."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"]
    scope.table.lock(x[dim], "softmax is taken over it")
    return x


@register("glu")
def glu(scope: Scope, node: Node) -> Axes:
    """Multiply the first half of a dimension by the sigmoid of the second."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dim"] % len(x)
    first, second = scope.table.cut(x[dim], scope.table.measure(x[dim]) // 2)
    scope.table.unify(first, second)
    return [*x[:dim], first, *x[dim + 1 :]]
