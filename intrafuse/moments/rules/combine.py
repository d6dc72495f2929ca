"""Moment rules for operators that combine activations: sums, gates, cat."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import Tree
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.moments.gaussian import product_moments
from intrafuse.moments.propagate import Moments, Propagation, register
from intrafuse.moments.rules.layers import relation
from intrafuse.moments.rules.pointwise import cross_covariance, of_values, transformed, values_of
from intrafuse.moments.rules.shape import kept, part


@register("add", "sub", "subtract", "rsub")
def add(self: Propagation, node: Node) -> Moments | None:
    """Add means and covariances.

    Summands of a residual stream count as independent. Exact for a constant, for functions of
    the same variables, and for layers that read the same activation.
    """
    pair = _operands(self, node)
    if pair is None or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    first, second = reversed(pair) if operator_name(node) == "rsub" else pair
    sign = 1.0 if operator_name(node) == "add" else -1.0
    one = torch.ones(1).double()
    if _is_constant(second):
        return _affine(first, one, sign * second.mean, second.tree)
    if _is_constant(first):
        return _affine(second, sign * one, first.mean, first.tree)
    if _same_variables(first, second):
        return of_values(self, first, values_of(first) + sign * values_of(second))
    covariance = first.covariance + second.covariance
    alike = len(first.mean) == len(second.mean)
    cross = cross_covariance(self, first, second) if alike else None
    if cross is not None:
        covariance = covariance + sign * (cross + cross.T)
    return Moments(_wider(first, second), first.mean + sign * second.mean, covariance)


@register("mul", "multiply")
def mul(self: Propagation, node: Node) -> Moments | None:
    """Scale by a constant, or multiply gates.

    Exact for functions of the same variables and for independent factors. For other functions of
    jointly Gaussian variables (SwiGLU, parts of one layer) mean and variances are exact, and
    covariances up to the third power of the correlations.
    """
    pair = _operands(self, node)
    return None if pair is None else _product(self, *pair)


def _product(self: Propagation, first: Moments, second: Moments) -> Moments:
    for x, y in ((first, second), (second, first)):
        if _is_constant(y):
            return _affine(x, y.mean, torch.zeros(1).double(), y.tree)
    if _same_variables(first, second):
        return of_values(self, first, values_of(first) * values_of(second))
    among = _relations(self, first, second)
    tree = _wider(first, second)
    if among is not None:
        return Moments(tree, *product_moments(values_of(first), values_of(second), among))
    a, b = first.covariance, second.covariance
    covariance = a * b
    covariance = covariance + a * torch.outer(second.mean, second.mean)
    covariance = covariance + b * torch.outer(first.mean, first.mean)
    return Moments(tree, first.mean * second.mean, covariance)


def _relations(self: Propagation, x: Moments, y: Moments) -> tuple[Tensor, Tensor, Tensor] | None:
    """Correlate the variables behind two factors; None for independent ones."""
    if x.origin is None or y.origin is None or len(x.mean) != len(y.mean):
        return None
    between = relation(self, x.origin, y.origin)
    if between is None:
        return None
    first, second = (relation(self, m.origin, m.origin) for m in (x, y) if m.origin is not None)
    return None if first is None or second is None else (first, between, second)


@register("div", "divide", "true_divide")
def div(self: Propagation, node: Node) -> Moments | None:
    """Divide by a constant, or by a function of the same variables that has no zero."""
    pair = _operands(self, node)
    if pair is None or node.kwargs.get("rounding_mode") is not None:
        return None
    first, second = pair
    if _is_constant(second) and bool(second.mean.all()):
        return _affine(first, 1 / second.mean, torch.zeros(1).double(), second.tree)
    if _same_variables(first, second):
        below = values_of(second)
        if bool((below > 0).all()) or bool((below < 0).all()):
            return of_values(self, first, values_of(first) / below)
    return None


@register("glu")
def glu(self: Propagation, node: Node) -> Moments | None:
    """Multiply the first half by the sigmoid of the second, as `mul` does."""
    args = arguments(node)
    before, axes = self.operand(args["self"]), self.axes(args["self"])
    half = self.axes(node)[args["dim"]]
    n = self.size(half)
    if before is None:
        return None
    if axes[args["dim"]] != before.tree:  # two positions of each channel: no known correlation
        return None
    value, gate = (part(self, before, before.tree, start, half) for start in (0, n))
    assert value is not None and gate is not None
    return _product(self, value, transformed(self, gate, torch.sigmoid))


@register("cat", "concat", "concatenate")
def cat(self: Propagation, node: Node) -> Moments | None:
    """Put channels side by side, or mix the moments of positions.

    Functions of the same variables are correlated; other parts count as independent.
    """
    args = arguments(node)
    axes = self.axes(node)
    dim = args["dim"] % len(axes)
    parts = [self.operand(n, self.axes(n)[dim]) for n in args["tensors"]]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    if all(m.tree == self.axes(n)[dim] for m, n in zip(known, args["tensors"], strict=True)):
        return _beside(self, known, axes[dim])
    if any(m.tree != known[0].tree for m in known) or kept(self, known[0], axes) is None:
        return None
    counts = torch.tensor([n.meta["val"].shape[dim] for n in args["tensors"]]).double()
    return _mixture(known, counts / counts.sum())


def _beside(self: Propagation, parts: list[Moments], tree: Tree) -> Moments:
    covariance = torch.block_diag(*(part.covariance for part in parts))
    ends = torch.tensor([len(part.mean) for part in parts]).cumsum(0).tolist()
    places = [slice(end - len(part.mean), end) for end, part in zip(ends, parts, strict=True)]
    for i, x in enumerate(parts):
        for j, y in enumerate(parts[:i]):
            cross = cross_covariance(self, x, y)
            if cross is not None:
                covariance[places[i], places[j]] = cross
                covariance[places[j], places[i]] = cross.T
    return Moments(tree, torch.cat([part.mean for part in parts]), covariance)


def _mixture(parts: list[Moments], shares: Tensor) -> Moments:
    """Describe positions of which a share is of each kind."""
    means = torch.stack([part.mean for part in parts])
    mean = shares @ means
    apart = means - mean
    covariance = (apart * shares[:, None]).T @ apart
    for share, one in zip(shares, parts, strict=True):
        covariance += share * one.covariance
    return Moments(parts[0].tree, mean, covariance)


def _operands(self: Propagation, node: Node) -> tuple[Moments, Moments] | None:
    """Describe two operands along the same channel axis, over which one may broadcast."""
    x, y = node.args[:2]
    first = self.operand(x)
    second = self.operand(y, None if first is None else first.tree)
    if first is None and second is not None:
        first = self.operand(x, second.tree)
    if first is None or second is None:
        return None
    alike = first.tree == second.tree or 1 in (len(first.mean), len(second.mean))
    return (first, second) if alike else None


def _wider(first: Moments, second: Moments) -> Tree:
    return second.tree if len(second.mean) > len(first.mean) else first.tree


def _is_constant(moments: Moments) -> bool:
    return not moments.covariance.any()


def _same_variables(x: Moments, y: Moments) -> bool:
    """Tell whether channel i of both is a function of the same Gaussian variable."""
    if x.origin is None or y.origin is None or len(x.mean) != len(y.mean):
        return False
    a, b = x.origin.rows, y.origin.rows
    same_rows = a is b or (a is not None and b is not None and torch.equal(a, b))
    return x.origin.node is y.origin.node and same_rows


def _affine(before: Moments, scale: Tensor, shift: Tensor, tree: Tree) -> Moments:
    """Multiply by a scale and add a shift, each (channels,) of an axis, or (1,)."""
    mean = before.mean * scale + shift
    covariance = before.covariance * (scale * scale[:, None])
    if len(mean) > len(before.mean):  # one channel broadcasts over the channels of a parameter
        return Moments(tree, mean, covariance.expand(len(mean), len(mean)))
    origin = before.origin
    if origin is not None:
        values = values_of(before) * scale[:, None] + shift[:, None]
        origin = replace(origin, values=values)
    return Moments(before.tree, mean, covariance, origin)
