"""Moment rules for operators that combine activations: sums, gates, cat."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import UNIT, Tree
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.registry import JOINS
from intrafuse.moments.gaussian import product_moments
from intrafuse.moments.propagate import Moments, Propagation, register
from intrafuse.moments.rules.layers import relation
from intrafuse.moments.rules.norms import norm_by_hand, signed
from intrafuse.moments.rules.pointwise import (
    cross_covariance,
    has_one_sign,
    is_constant,
    of_values,
    same_variables,
    transformed,
    values_of,
)
from intrafuse.moments.rules.shape import elsewhere, kept, part

ONE, ZERO = torch.ones(1).double(), torch.zeros(1).double()
ELEMENTWISE = frozenset(
    ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "where", "lerp")
)


@register("add", "sub", "subtract", "rsub")
def add(propagation: Propagation, node: Node) -> Moments | None:
    """Add means and covariances.

    Summands of a residual stream are assumed to be independent. Exact for a constant, for
    functions of the same variables, and for layers that read the same activation.
    """
    pair = _operands(propagation, node)
    if pair is None:
        return None
    first, second = reversed(pair) if operator_name(node) == "rsub" else pair
    sign = 1.0 if operator_name(node) == "add" else -1.0
    return _sum(propagation, first, second, sign * float(arguments(node).get("alpha", 1)))


def _sum(propagation: Propagation, first: Moments, second: Moments, times: float) -> Moments:
    """Describe first + times second."""
    if is_constant(second):
        return _affine(propagation, first, ONE, times * second.mean, second.tree)
    if is_constant(first):
        return _affine(propagation, second, times * ONE, first.mean, first.tree)
    if same_variables(first, second):
        return of_values(first, values_of(first) + times * values_of(second))
    covariance = first.covariance + times**2 * second.covariance
    cross = cross_covariance(first, second) if first.tree == second.tree else None
    if cross is not None:
        covariance = covariance + times * (cross + cross.T)
    return Moments(_wider(propagation, first, second), first.mean + times * second.mean, covariance)


@register("mul", "multiply")
def mul(propagation: Propagation, node: Node) -> Moments | None:
    """Scale by a constant, or multiply gates.

    Exact for functions of the same variables and for independent factors. For other functions of
    jointly Gaussian variables (SwiGLU, parts of one layer) mean and variances are exact, and
    covariances up to the third power of the correlations.
    """
    norm = norm_by_hand(propagation, node)
    pair = _operands(propagation, node) if norm is None else None
    return norm if pair is None else _product(propagation, *pair)


def _product(propagation: Propagation, first: Moments, second: Moments) -> Moments:
    for x, y in ((first, second), (second, first)):
        if is_constant(y):
            return _affine(propagation, x, y.mean, ZERO, y.tree)
    if same_variables(first, second):
        return of_values(first, values_of(first) * values_of(second))
    among = _relations(first, second)
    tree = _wider(propagation, first, second)
    if among is not None:
        return Moments(tree, *product_moments(values_of(first), values_of(second), among))
    a, b = first.covariance, second.covariance
    covariance = a * b
    covariance = covariance + a * torch.outer(second.mean, second.mean)
    covariance = covariance + b * torch.outer(first.mean, first.mean)
    return Moments(tree, first.mean * second.mean, covariance)


def _relations(x: Moments, y: Moments) -> tuple[Tensor, Tensor, Tensor] | None:
    """Correlate the variables behind two factors; None for independent ones."""
    between = relation(x, y) if x.tree == y.tree else None
    first, second = (None if between is None else relation(m, m) for m in (x, y))
    return None if between is None or first is None or second is None else (first, between, second)


@register("div", "divide", "true_divide")
def div(propagation: Propagation, node: Node) -> Moments | None:
    """Divide by a constant, or by a function of the same variables that has no zero."""
    norm = norm_by_hand(propagation, node)
    pair = _operands(propagation, node) if norm is None else None
    if pair is None or node.kwargs.get("rounding_mode") is not None:
        return norm
    return _quotient(propagation, *pair)


def _quotient(propagation: Propagation, first: Moments, second: Moments) -> Moments | None:
    if is_constant(second):
        return (
            _affine(propagation, first, 1 / second.mean, ZERO, second.tree)
            if second.mean.all()
            else None
        )
    fixed = is_constant(first) and (first.tree == second.tree or propagation.is_single(first.tree))
    below = values_of(second)
    if (fixed or same_variables(first, second)) and has_one_sign(below):
        above = first.mean[:, None] if fixed else values_of(first)
        return of_values(second, above / below)
    return None


@register("reciprocal")
def reciprocal(propagation: Propagation, node: Node) -> Moments | None:
    """Divide one by a function without a zero."""
    one, below = propagation.operand(1.0), propagation.operand(node.args[0])
    return None if one is None or below is None else _quotient(propagation, one, below)


@register("lerp")
def lerp(propagation: Propagation, node: Node) -> Moments | None:
    """Mix two activations by a number, as products and a sum do."""
    pair, weight = _operands(propagation, node), arguments(node)["weight"]
    if pair is None or not isinstance(weight, int | float):
        return None
    return _sum(
        propagation, _affine(propagation, pair[0], (1 - weight) * ONE, ZERO, UNIT), pair[1], weight
    )


@register("sum")
def sum_(propagation: Propagation, node: Node) -> Moments | None:
    """Sum over positions: their mean times their number, with the moments of one position."""
    args = arguments(node)
    before, axes, dims = (
        propagation.operand(args["self"]),
        propagation.axes(args["self"]),
        args.get("dim"),
    )
    found = elsewhere(propagation, before, node) if before is not None and dims else None
    if found is None or dims is None:
        return None
    count = prod(propagation.size(axes[dim]) for dim in ([dims] if isinstance(dims, int) else dims))
    return _affine(propagation, found, count * ONE, ZERO, UNIT)


@register("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "new_zeros", "new_ones",
          "new_full", "scalar_tensor")  # fmt: skip
def filled(propagation: Propagation, node: Node) -> Moments | None:
    """Return a constant, unless a later operator may overwrite it."""
    for user in node.users:
        changes = user.args[0] is node and str(user.target).split(".")[1].endswith("_")
        if changes or operator_name(user) not in ELEMENTWISE:
            return None
    args = arguments(node)
    value = args.get("fill_value", args.get("s", float("ones" in operator_name(node))))
    return propagation.operand(value) if isinstance(value, int | float) else None


@register("glu")
def glu(propagation: Propagation, node: Node) -> Moments | None:
    """Multiply the first half by the sigmoid of the second, as `mul` does."""
    args = arguments(node)
    before, axes = propagation.operand(args["self"]), propagation.axes(args["self"])
    half = propagation.axes(node)[args["dim"]]
    n = propagation.size(half)
    if before is None:
        return None
    if axes[args["dim"]] != before.tree:  # two positions of each channel: no known correlation
        return None
    value, gate = (part(propagation, before, before.tree, start, half) for start in (0, n))
    assert value is not None and gate is not None
    return _product(propagation, value, transformed(gate, torch.sigmoid))


@register(*sorted(JOINS))
def cat(propagation: Propagation, node: Node) -> Moments | None:
    """Put channels side by side, or mix the moments of positions.

    Functions of the same variables are correlated; other parts are assumed to be independent.
    """
    args = arguments(node)
    axes = propagation.axes(node)
    dim = args["dim"] % len(axes)
    parts = [propagation.operand(n, propagation.axes(n)[dim]) for n in args["tensors"]]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    if all(m.tree == propagation.axes(n)[dim] for m, n in zip(known, args["tensors"], strict=True)):
        return _beside(propagation, known, axes[dim])
    if any(m.tree != known[0].tree for m in known) or kept(propagation, known[0], axes) is None:
        return None
    counts = torch.tensor(
        [propagation.size(propagation.axes(n)[dim]) for n in args["tensors"]]
    ).double()
    return _mixture(known, counts / counts.sum())


@register("stack")
def stack(propagation: Propagation, node: Node) -> Moments | None:
    """Mix the moments of positions."""
    parts = [propagation.operand(n) for n in arguments(node)["tensors"]]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or any(m.tree != known[0].tree for m in known):
        return None
    found = kept(propagation, known[0], propagation.axes(node)) is not None
    return _mixture(known, torch.full((len(known),), 1 / len(known)).double()) if found else None


def _beside(propagation: Propagation, parts: list[Moments], tree: Tree) -> Moments:
    covariance = torch.block_diag(*(part.covariance for part in parts))
    ends = torch.tensor([len(part.mean) for part in parts]).cumsum(0).tolist()
    places = [slice(end - len(part.mean), end) for end, part in zip(ends, parts, strict=True)]
    for i, x in enumerate(parts):
        for j, y in enumerate(parts[:i]):
            cross = cross_covariance(x, y)
            if cross is not None:
                covariance[places[i], places[j]] = cross
                covariance[places[j], places[i]] = cross.T
    return Moments(tree, torch.cat([part.mean for part in parts]), covariance)


def _mixture(parts: list[Moments], shares: Tensor) -> Moments:
    """Describe a mixture of positions with given shares of each kind."""
    means = torch.stack([part.mean for part in parts])
    mean = shares @ means
    apart = means - mean
    covariance = (apart * shares[:, None]).T @ apart
    for share, one in zip(shares, parts, strict=True):
        covariance += share * one.covariance
    return Moments(parts[0].tree, mean, covariance)


def _operands(propagation: Propagation, node: Node) -> tuple[Moments, Moments] | None:
    """Describe two operands along the same channel axis, over which one may broadcast."""
    x, y = (propagation.number(node, n) if isinstance(n, int | float) else n for n in node.args[:2])
    first = propagation.operand(x)
    second = propagation.operand(y, None if first is None else first.tree)
    if first is None and second is not None:
        first = propagation.operand(x, second.tree)
    if first is None or second is None:
        return None
    alike = first.tree == second.tree or any(propagation.is_single(m.tree) for m in (first, second))
    return (first, second) if alike else None


def _wider(propagation: Propagation, first: Moments, second: Moments) -> Tree:
    return second.tree if propagation.is_single(first.tree) else first.tree


def _affine(
    propagation: Propagation, before: Moments, scale: Tensor, shift: Tensor, tree: Tree
) -> Moments:
    """Multiply by a scale and add a shift, each (channels,) of an axis, or (1,)."""
    mean = before.mean * scale + shift
    if propagation.is_single(before.tree) and not propagation.is_single(tree):
        # one channel broadcasts over the channels of a parameter
        return Moments(tree, mean, before.covariance * (scale * scale[:, None]))
    origin = before.derived()
    if origin is not None:
        values = values_of(before) * scale[:, None] + shift[:, None]
        origin = replace(origin, values=values)

    def known() -> tuple[Tensor, Tensor]:
        among, std = before.correlated
        return signed(among, scale.expand_as(std)), std * scale.abs()

    return Moments(before.tree, mean, known, origin)
