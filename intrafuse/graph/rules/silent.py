"""Tell whether channels are zero wherever the weights that write them are.

A product of two activations that sums over channels loses nothing with a channel that is zero in
one of them. Features such as elu(x) + 1 are never zero: without a channel another sum is computed.
"""

from __future__ import annotations

from torch.fx import Node

from intrafuse.graph.axes import leaves
from intrafuse.graph.rules.pointwise import BINARY, UNARY
from intrafuse.graph.rules.registry import VIEWS, Scope, operator_name

__all__ = ["is_silent"]

NEVER_ZERO = frozenset(
    "exp exp2 sigmoid hardsigmoid log_sigmoid softplus softmax _softmax cos cosh log reciprocal "
    "rsqrt logical_not bitwise_not eq ge le".split()
)
MOVES = VIEWS | frozenset(
    "view reshape flatten unflatten expand squeeze getitem chunk split sum mean".split()
)
PRODUCTS = frozenset("mul multiply matmul bmm mm einsum".split())


def is_silent(scope: Scope, node: Node, atoms: set[int]) -> bool:
    """Tell whether a tensor is zero in the channels whose weights are; unknown operators count so.

    Args:
        scope: the trace.
        node: the tensor.
        atoms: those of the channels; only operands that have them are looked at.
    """
    name = operator_name(node) if node.op == "call_function" else ""
    operands = [n for n in node.all_input_nodes if _has(scope, n, atoms)]
    if name in NEVER_ZERO:
        return False
    if name in ("add", "sub", "rsub"):
        constant = len(operands) < 2 and len(node.all_input_nodes) < 2
        constant &= any(isinstance(x, int | float) and bool(x) for x in node.args[:2])
        return not constant and all(is_silent(scope, n, atoms) for n in operands)
    if name in PRODUCTS:
        return not operands or any(is_silent(scope, n, atoms) for n in operands)
    passes = name in UNARY or name in BINARY or name in MOVES
    return not passes or not operands or is_silent(scope, operands[0], atoms)


def _has(scope: Scope, node: Node, atoms: set[int]) -> bool:
    values = scope.values.get(node, [])
    trees = [t for value in values for t in (value if isinstance(value, list) else [value])]
    return any(not atoms.isdisjoint(leaves(scope.table.resolve(tree))) for tree in trees)
