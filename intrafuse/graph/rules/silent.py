"""Decide whether channels are zero if the weights that write them are zero.

Operators that sum over channels (a product of two activations, a sum, the length of a vector) lose
nothing with a zero channel. Features such as elu(x) + 1 are never zero, so removing such a channel
changes the sum. An operator without a rule here counts as never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from intrafuse.graph.axes import leaves
from intrafuse.graph.rules.pointwise import UNARY
from intrafuse.graph.rules.reduce import POOLS, UPSAMPLE
from intrafuse.graph.rules.registry import (
    CASTS,
    JOINS,
    REPEATS,
    SPLITS,
    VIEWS,
    Scope,
    arguments,
    compute,
    entering,
    operator_name,
)
from intrafuse.graph.rules.views import parameter_view
from intrafuse.graph.typed import is_several

__all__ = ["is_silent"]

MOVES = (
    VIEWS | SPLITS | JOINS | frozenset(POOLS) | frozenset(UPSAMPLE)
    | frozenset(f"max_pool{n}d_with_indices" for n in (1, 2, 3))
    | frozenset(
        "getitem unbind sum mean amax amin "
        "max min var std prod linalg_vector_norm stack index _unsafe_index "
        "gather take_along_dim index_select roll tile repeat_interleave flip sort topk kthvalue "
        "cumsum index_add scatter_add pixel_shuffle "
        "pixel_unshuffle channel_shuffle im2col col2im unfold grid_sampler grid_sampler_2d "
        "grid_sampler_3d real imag conj resolve_conj view_as_complex view_as_real prelu".split()
    )
)  # fmt: skip
SPREADS = CASTS | REPEATS
FOURIER = "fft_"  # begins the names of transforms, which are linear
LAYERS = (
    *("linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)


class _Search:
    """Results for the tensors that lead to one tensor.

    Attributes:
        scope: the trace.
        atoms: the atoms of the channels.
        known: tensor with the channels -> whether it is zero in them.
    """

    def __init__(self, scope: Scope, atoms: set[int]) -> None:
        self.scope, self.atoms = scope, atoms
        self.known: dict[Node, bool] = {}
        self._found: dict[Node, bool] = {}

    def has(self, node: Any) -> bool:
        """Tell whether the channels lie on a tensor."""
        if node not in self._found:
            resolve = self.scope.table.resolve
            trees = map(resolve, self.scope.trees(node))
            found = any(not self.atoms.isdisjoint(leaves(tree)) for tree in trees)
            self._found[node] = found
        return self._found[node]

    def silent(self, node: Any) -> bool:
        """Tell whether the channels lie on a tensor and are zero there."""
        return isinstance(node, Node) and self.has(node) and self.known.get(node, False)


Rule = Callable[[_Search, Node, dict[str, Any]], bool]
RULES: dict[str, Rule] = {}


def is_silent(scope: Scope, node: Node, atoms: set[int]) -> bool:
    """Tell whether a tensor is zero in channels whose weights are zero.

    Args:
        scope: the trace.
        node: the tensor.
        atoms: the atoms of the channels.
    """
    search = _Search(scope, atoms)
    waiting = [node]
    while waiting:
        top = waiting[-1]
        open_ = [n for n in top.all_input_nodes if n not in search.known and search.has(n)]
        if open_:
            waiting += open_
        else:
            search.known[waiting.pop()] = _is_zero(search, top)
    return search.silent(node)


def _is_zero(search: _Search, node: Node) -> bool:
    if node.op != "call_function":
        return node in search.scope.parameters
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not _counts(value):
        return False
    name = operator_name(node)
    if name in RULES:
        return RULES[name](search, node, arguments(node))
    if name in MOVES or name.startswith(FOURIER):
        return all(map(search.silent, _values(search, node)))
    return name in UNARY and _keeps_zero(search, node)


def _values(search: _Search, node: Node) -> Iterator[Node]:
    """List operands that have the channels and contribute values instead of positions."""
    only = 1 if operator_name(node).endswith("_as") else None  # second: only shape or dtype
    for operand in node.all_input_nodes[:only]:
        value = operand.meta.get("val")
        if search.has(operand) and (not isinstance(value, torch.Tensor) or _counts(value)):
            yield operand


def _counts(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _keeps_zero(search: _Search, node: Node) -> bool:
    """Tell whether an elementwise function maps zero to zero, by computing it.

    A function of a parameter counts as never zero, because masks leave such parameters unchanged.
    """
    (source, *others) = node.all_input_nodes
    if others or not search.silent(source) or parameter_view(search.scope, source) is not None:
        return False
    try:
        value = compute(node, torch.zeros(1))
    except (RuntimeError, TypeError):
        return False
    return isinstance(value, torch.Tensor) and bool((value == 0).all())


def _register(*operators: str) -> Callable[[Rule], Rule]:
    return entering(RULES, operators, "rule of silence")


@_register(*LAYERS)
def _layer(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    bias = args["bias"]
    if search.has(args["weight"]) and parameter_view(search.scope, args["weight"]) is not None:
        return bias is None or search.silent(bias)
    return bias is None and search.silent(args["input"])


@_register("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
def _norm(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    bias = args.get("bias")
    scaled = search.silent(args["weight"]) or search.silent(args["input"])
    return scaled and (bias is None or search.silent(bias))


@_register("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
           "rnn_relu_cell")  # fmt: skip
def _recurrent(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    states = args["hx"]
    return all(map(search.silent, states if is_several(states) else [states]))


@_register("zeros", "new_zeros", "zeros_like")
def _zeros(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return True


@_register("add", "sub", "subtract", "rsub", "maximum", "minimum", "lerp")
def _all(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    numbers = [x for x in node.args[:2] if isinstance(x, int | float)]
    tensors = node.all_input_nodes[:2] if "weight" in args else node.all_input_nodes
    return not any(numbers) and all(map(search.silent, tensors))


@_register("mul", "multiply", "matmul", "bmm", "mm", "mv", "einsum", "outer", "glu")
def _any(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return any(map(search.silent, node.all_input_nodes))


@_register("addmm", "baddbmm")
def _added(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    first, *factors = node.all_input_nodes
    return search.silent(first) and any(map(search.silent, factors))


@_register("addcmul")
def _added_product(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return search.silent(args["self"]) and any(map(search.silent, node.all_input_nodes[1:]))


@_register("div", "divide", "true_divide")
def _quotient(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    first, other = node.args[:2]
    while isinstance(other, Node) and search.has(other) and operator_name(other) in SPREADS:
        other = other.all_input_nodes[0]
    return search.silent(first) and not (isinstance(other, Node) and search.has(other))


@_register("scaled_dot_product_attention")
def _attention(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return search.silent(args["value"])


@_register("embedding", "embedding_bag")
def _rows(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return search.silent(args["weight"])


@_register("where")
def _either(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return all(search.silent(x) or x == 0 for x in (args["self"], args["other"]))


@_register("masked_fill")
def _filled(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return search.silent(args["self"]) and args["value"] == 0


@_register("pad", "constant_pad_nd")
def _padded(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return search.silent(args["self"]) and not args.get("value")


@_register("_weight_norm")
def _computed(search: _Search, node: Node, args: dict[str, Any]) -> bool:
    return False  # a norm that must not be zero
