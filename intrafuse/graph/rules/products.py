"""Rules for products of two tensors: matmul, einsum, and attention (fused or written by hand).

A product with a parameter is a layer: it reads the axis that it sums over, and writes the axis that
only the parameter has. A product of two activations couples their axes: queries with keys,
attention weights with values. Channels of the summed axis, and of axes that both activations and
the result have (heads), may be removed but not combined (see
`intrafuse.pruning.each_group.merge_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn
from torch.fx import Node

from intrafuse.graph.axes import UNIT, Product, Tree
from intrafuse.graph.groups import Attribute, Kind, Role
from intrafuse.graph.rules.layers import declare
from intrafuse.graph.rules.registry import Axes, LockError, Scope, operator_name, register
from intrafuse.graph.rules.scale import follow_size
from intrafuse.graph.rules.silent import is_silent
from intrafuse.graph.rules.views import parameter_view
from intrafuse.graph.typed import named_modules

SUMMED = "a product of two activations sums over it"
BESIDE = "each of its channels multiplies two activations on its own"
DIVIDED = "torch.nn.MultiheadAttention divides the width of its queries among heads; that stays"
NEVER_SILENT = "a product sums over features of it that no weights can make zero"
SPECTRAL = (
    "it multiplies two parameters, as spectral norm does (torch.nn.utils.parametrize."
    "remove_parametrizations, or torch.nn.utils.remove_spectral_norm, makes its weight a plain one)"
)
SHARING = "the query heads of one key-value head stay together"


@register("matmul", "bmm", "mm", "mv")
def matmul(scope: Scope, node: Node) -> Axes:
    """Sum over the last dimension of the first tensor and the second-to-last of the second."""
    args = scope.arguments(node)
    second = next(args[name] for name in ("mat2", "other", "vec") if name in args)
    return _product(scope, node, args["self"], second)


@register("dot", "vdot", "inner", "tensordot")
def inner(scope: Scope, node: Node) -> Axes:
    """Sum over the last dimension of both tensors, or over the given dimensions."""
    args = scope.arguments(node)
    a = args["self"]
    b = next(args[name] for name in ("tensor", "other") if name in args)
    ranks = len(scope.shape(a)), len(scope.shape(b))
    pairs = [*zip(args.get("dims_self", (-1,)), args.get("dims_other", (-1,)), strict=True)]
    one, two = [*range(ranks[0])], [*range(ranks[0], sum(ranks))]
    for i, j in pairs:
        two[j] = one[i]
    result = [name for name in (*one, *two) if (name in one) != (name in two)]
    return contract(scope, node, (a, b), (one, two), result)


@register("linalg_vecdot")
def vecdot(scope: Scope, node: Node) -> Axes:
    """Sum over one common dimension."""
    args = scope.arguments(node)
    operands = args["x"], args["y"]
    rank = max(len(scope.shape(x)) for x in operands)
    labels = [[*range(rank)][rank - len(scope.shape(x)) :] for x in operands]
    summed = args["dim"] % rank
    return contract(scope, node, operands, labels, [n for n in range(rank) if n != summed])


@register("addmm", "baddbmm")
def addmm(scope: Scope, node: Node) -> Axes:
    """Add a tensor, such as a bias, to a product."""
    args = scope.arguments(node)
    second = args["mat2"] if "mat2" in args else args["batch2"]
    bias = args["self"]
    weight = parameter_view(scope, second)
    if bias not in scope.parameters or weight is None or len(scope.shape(bias)) != 1:
        result = _product(scope, node, args["mat1"] if "mat1" in args else args["batch1"], second)
        for back, other in enumerate(reversed(scope.axes(bias)), 1):
            if scope.shape(bias)[-back] != 1:
                scope.table.unify(result[-back], other)
        return [scope.table.resolve(tree) for tree in result]
    if args["beta"] != 1 or args["alpha"] != 1:
        raise LockError("it multiplies its weight or bias by a number")
    name = scope.parameters[bias]
    result = _product(scope, node, args["mat1"], second, name)
    scope.table.unify(result[-1], scope.axes(bias)[0])
    scope.use(name, 0, "writer", "bias")
    return [scope.table.resolve(tree) for tree in result]


def _product(scope: Scope, node: Node, a: Node, b: Node, bias: str | None = None) -> Axes:
    """Write a matrix product with broadcast leading dimensions as labels for `contract`.

    A vector has only the summed dimension.
    """
    rows, columns = len(scope.shape(a)), len(scope.shape(b))
    batch = max(rows, columns, 2) - 2
    letters = list(range(batch))
    one = [-2] if rows == 1 else [*letters[batch - (rows - 2) :], -1, -2]
    two = [-2] if columns == 1 else [*letters[batch - (columns - 2) :], -2, -3]
    result = [n for n in (*letters, -1, -3) if n in one or n in two]
    return contract(scope, node, (a, b), (one, two), result, bias)


@register("einsum")
def einsum(scope: Scope, node: Node) -> Axes:
    """Sum products of two tensors over the letters that the result does not name."""
    args = scope.arguments(node)
    operands = args["tensors"]
    read = _read_equation(args["equation"], [len(scope.shape(operand)) for operand in operands])
    if len(operands) != 2 or read is None:
        raise LockError(f"no rule reads the equation {args['equation']}")
    return contract(scope, node, operands, *read)


def _read_equation(equation: str, ranks: list[int]) -> tuple[list[list[int]], list[int]] | None:
    """Turn an equation into labels for the dimensions of each tensor and of the result.

    An ellipsis stands for dimensions that broadcast from the last one. Return None if a letter
    occurs twice in one term.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    letters = "".join(terms).replace(".", "")
    if not arrow:
        right = "..." * ("." in left) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    named = [term.replace("...", "") for term in terms]
    dots = [rank - len(term) for rank, term in zip(ranks, named, strict=True)]
    if any(len(set(term)) != len(term) for term in named):
        return None

    def labels(term: str, dotted: int) -> list[int]:
        before, found, after = term.partition("...")
        between = range(-dotted, 0) if found else ()
        return [*map(ord, before), *between, *map(ord, after)]

    return [*map(labels, terms, dots)], labels(right, max(dots))


@register("outer", "ger")
def outer(scope: Scope, node: Node) -> Axes:
    """Multiply each position of one vector by each position of another."""
    args = scope.arguments(node)
    return [*scope.axes(args["self"]), *scope.axes(args["vec2"])]


def contract(
    scope: Scope,
    node: Node,
    operands: Sequence[Node],
    labels: Sequence[Sequence[int]],
    output: Sequence[int],
    bias: str | None = None,
) -> Axes:
    """Couple axes of two tensors that have the same label, and record the role of each axis.

    Args:
        scope, node: the trace and the operator, as for a rule.
        operands: the two tensors.
        labels: for each tensor, one label per dimension.
        output: the labels of the result; the others are summed over.
        bias: a parameter that is added to the result.
    """
    table = scope.table
    trees: dict[int, Tree] = {}
    sizes: dict[int, int] = {}
    for operand, names in zip(operands, labels, strict=True):
        for name, tree, size in zip(names, scope.axes(operand), scope.shape(operand), strict=True):
            if name not in trees or sizes[name] == 1:
                trees[name], sizes[name] = tree, size
            elif size != 1:
                table.unify(trees[name], tree)
    weights = [parameter_view(scope, operand) for operand in operands]
    summed = [name for name in trees if name not in output]
    if weights[0] is None and weights[1] is None:
        _couple(scope, node, labels, output, trees, sizes)
        for atom in (atom for name in summed for atom in scope.free_atoms(trees[name])):
            if not any(is_silent(scope, operand, {atom}) for operand in operands):
                table.lock(atom, NEVER_SILENT)
    elif weights[0] is not None and weights[1] is not None:
        raise LockError(SPECTRAL)
    else:
        which = 0 if weights[0] is not None else 1
        _layer(scope, node, operands[which], labels[which], labels[1 - which], output, trees, bias)
    count = prod(sizes[name] for name in (*output, *summed))
    scaled = [trees[name] for name in (*output, *summed) if sizes[name] > 1]
    whole = prod(table.measure(tree) for tree in scaled)
    scope.cost(node, operator_name(node), count / max(whole, 1), *scaled)
    return [table.resolve(trees[name]) for name in output]


def _couple(
    scope: Scope,
    node: Node,
    labels: Sequence[Sequence[int]],
    output: Sequence[int],
    trees: Mapping[int, Tree],
    sizes: Mapping[int, int],
) -> None:
    """Record that channels in a product of two activations may be removed but not combined."""
    beside = [n for n in trees if n in output and all(n in names for names in labels)]
    beside = [name for name in beside if sizes[name] > 1]
    for name in trees:
        if name not in output:
            scope.table.choose(trees[name], SUMMED)
            scope.contracted[node] = trees[name]
        elif name in beside:
            scope.table.choose(trees[name], BESIDE)
            _together(scope, trees[name])
            scope.follow(node, "heads", trees[name])
    if beside:  # as in attention: queries meet keys, then weights meet values
        for name in trees:
            if name not in output:
                scope.follow(node, "width", trees[name])
            elif name not in beside and name in labels[1]:
                scope.follow(node, "value width", trees[name])


def _layer(
    scope: Scope,
    node: Node,
    operand: Node,
    own: Sequence[int],
    others: Sequence[int],
    output: Sequence[int],
    trees: Mapping[int, Tree],
    bias: str | None,
) -> None:
    """Record the role of a parameter in a product with an activation."""
    known = parameter_view(scope, operand)
    assert known is not None
    parameter, axes = known
    written: list[int] = []
    read: list[int] = []
    for label, axis in zip(own, axes, strict=True):
        if axis is None:
            continue
        if label not in output:
            read.append(axis)
            scope.use(parameter, axis, "reader", "weight")
        elif label in others:
            scope.use(parameter, axis, "carrier", "scale")
        else:
            written.append(axis)
            buffer = parameter not in scope.trained
            role = ("carrier", "scale") if buffer else ("writer", "weight")
            scope.use(parameter, axis, *role)
    if len(written) == len(read) == 1 and len(scope.parameter_axes[parameter]) == 2:
        out = trees[own[axes.index(written[0])]]
        declare(scope, node, parameter, bias, (written[0], read[0]), out)
        for attribute in ("nf", "out_features"):
            scope.attribute(parameter, attribute, out)
        for attribute in ("nx", "in_features"):
            scope.attribute(parameter, attribute, trees[own[axes.index(read[0])]])


@register("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_product(scope: Scope, node: Node) -> Axes:
    """Multiply each run of rows by the matrix of its expert."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node) and isinstance(weight, Node)
    known, trees = parameter_view(scope, weight), scope.axes(weight)
    if known is None or None in known[1] or len(trees) != 3 or len(scope.shape(x)) != 2:
        raise LockError("its weight is not a parameter with one matrix per expert")
    parameter, axes = known
    experts, columns, rows = trees
    scope.table.lock(experts, "tokens are sent to experts by number")
    scope.table.unify(columns, scope.axes(x)[-1])
    uses: tuple[tuple[Role, Kind], ...] = (
        ("carrier", "scale"),
        ("reader", "weight"),
        ("writer", "weight"),
    )
    for axis, (role, kind) in zip(axes, uses, strict=True):
        assert axis is not None
        scope.use(parameter, axis, role, kind)
    scope.cost(node, "experts", scope.shape(x)[0], columns, rows)
    return [scope.axes(x)[0], scope.table.resolve(rows)]


@register("scaled_dot_product_attention")
def attention(scope: Scope, node: Node) -> Axes:
    """softmax(q k^T scale) v: couple heads, widths of queries and keys, and lengths."""
    args = scope.arguments(node)
    q, k, v = (scope.axes(args[name]) for name in ("query", "key", "value"))
    table = scope.table
    batch = len(q) - 2
    if args["enable_gqa"]:
        _share_heads(scope, q[batch - 1], k[batch - 1])
        scope.unify(q[: batch - 1], k[: batch - 1])
        scope.unify(k[:batch], v[:batch])
    else:
        for axes in (k, v):
            scope.unify(q[:batch], axes[:batch])
    table.unify(q[-1], k[-1])
    table.unify(k[-2], v[-2])
    if args["attn_mask"] is not None:
        _couple_mask(scope, args["attn_mask"], [*q[:-1], k[-2]])
    for tree in (q[-2], k[-2]):
        table.lock(tree, "positions of a sequence")
    table.choose(q[-1], SUMMED)
    scope.contracted[node] = q[-1]
    for tree in q[:batch]:
        table.choose(tree, BESIDE)
    _together(scope, q[batch - 1] if batch else UNIT)
    if args["scale"] is None:
        follow_size(scope, node, args["query"], q[-1], 0.5)
    for what, tree in (
        ("heads", q[batch - 1] if batch else UNIT),
        ("key heads", k[batch - 1] if batch else UNIT),
        ("width", q[-1]),
        ("value width", v[-1]),
        ("all", Product((q[batch - 1], q[-1])) if batch else UNIT),
    ):
        scope.follow(node, what, tree)
    scope.cost(node, "attention", 1, *q, k[-2])
    scope.cost(node, "attention", 1, *q[:-1], *v[-2:])
    return [*(table.resolve(tree) for tree in q[:-1]), table.resolve(v[-1])]


def _couple_mask(scope: Scope, mask: Node, products: Axes) -> None:
    """Couple a bias on the products of queries and keys, such as relative positions."""
    scope.carry(mask, "shift")
    axes, shape = scope.axes(mask), scope.shape(mask)
    for back, other in enumerate(reversed(products), 1):
        if back <= len(axes) and shape[-back] != 1:
            scope.table.unify(axes[-back], other)


def _share_heads(scope: Scope, queries: Tree, keys: Tree) -> None:
    """Couple each key-value head with the query heads that share it."""
    table = scope.table
    many, few = table.measure(queries), table.measure(keys)
    split = table.factor(queries, (few, many // few))
    if split is None:
        raise LockError("its query heads cannot be divided among its key-value heads")
    table.unify(split[0], keys)
    table.lock(split[1], SHARING)


def _together(scope: Scope, heads: Tree) -> None:
    """Lock single query heads that share a repeated key-value head: they go together."""
    tree = scope.table.resolve(heads)
    if isinstance(tree, Product):
        free = [factor for factor in tree.factors if not scope.is_fixed(factor)]
        for factor in free[1:]:
            scope.table.lock(factor, SHARING)


def tie_packed_heads(scope: Scope) -> None:
    """Couple the joint width of the heads of `torch.nn.MultiheadAttention` with its query width.

    Its code divides the query width among the heads, so both widths change only together.
    """
    for path, module in named_modules(scope.model):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight")
        weights = [f"{path}.{n}" if path else n for n in names]
        known = [scope.parameter_axes[n] for n in weights if n in scope.parameter_axes]
        if not known:
            continue
        wide, (width, same) = known[0][1], _widths(module)
        for rows, _ in known:
            rest = rows
            while scope.table.measure(rest):
                part, rest = scope.table.cut(rest, width)
                if scope.is_fixed(wide):
                    scope.table.lock(part, DIVIDED)
                else:
                    scope.table.unify(part, wide)
        follow = ("embed_dim", *(("kdim", "vdim") if same else ()))
        scope.attributes += [Attribute(path, name, wide) for name in follow]


def _widths(attention: Any) -> tuple[int, bool]:
    """Return the query width of `torch.nn.MultiheadAttention`; whether keys and values have it."""
    return attention.embed_dim, attention._qkv_same_embed_dim
