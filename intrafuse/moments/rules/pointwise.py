"""Moment rules for functions of each element, by Hermite expansion of Gaussian variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from intrafuse.graph.rules import arguments, operator_name
from intrafuse.moments.gaussian import (
    expanded,
    quadrature_values,
    scaled_covariance,
    transformed_covariance,
)
from intrafuse.moments.propagate import Moments, Propagation, register
from intrafuse.moments.rules.layers import relation

__all__ = [
    "cross_covariance",
    "has_one_sign",
    "is_constant",
    "of_values",
    "same_variables",
    "transformed",
    "values_of",
]


@register("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "rrelu",
          "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "clamp",
          "clamp_min", "clamp_max", "log_sigmoid", "threshold", "softshrink", "hardshrink",
          "tanhshrink", "square", "abs", "neg", "exp", "erf", "sin", "cos", "atan", "softsign",
          "expm1", "sqrt", "rsqrt", "log", "log1p", "nan_to_num", "maximum", "minimum", "fmax",
          "fmin", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
          "logical_or", "logical_not")  # fmt: skip
def pointwise(propagation: Propagation, node: Node) -> Moments | None:
    """Expand the function in Hermite polynomials of the Gaussian variable behind its input.

    Of several inputs, all must be functions of the same variables, or constants. The function
    must be defined for all values of a Gaussian variable.
    """
    given = {n: propagation.operand(n) for n in node.all_input_nodes}
    known = {n: moments for n, moments in given.items() if moments is not None}
    if len(known) < len(given):
        return None
    function = getattr(torch.ops.aten, operator_name(node))  # never in place
    masks = [arguments(node).get(name) for name in ("condition", "mask")]

    def applied(values: Mapping[Node, Tensor]) -> Tensor:
        values = {n: v != 0 if n in masks else v for n, v in values.items()}
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return function(*args, **kwargs).double()

    return _together(propagation, known, applied)


def _together(
    propagation: Propagation,
    given: Mapping[Node, Moments],
    function: Callable[[Mapping[Node, Tensor]], Tensor],
) -> Moments | None:
    """Apply a function to inputs that depend on the same variables, one for each channel."""
    moments = list(given.values())
    varying = [m for m in moments if not is_constant(m)]
    base = varying[0] if varying else max(moments, key=lambda m: len(m.mean))
    if not all(same_variables(base, other) for other in varying[1:]):
        return None
    if any(m.tree != base.tree and not propagation.is_single(m.tree) for m in moments):
        return None
    values = function({n: values_of(m) for n, m in given.items()})
    return of_values(base, values) if bool(values.isfinite().all()) else None


@register("pow")
def power(propagation: Propagation, node: Node) -> Moments | None:
    """Apply `pointwise` to powers whose exponent is a number."""
    before, exponent = propagation.operand(node.args[0]), node.args[1]
    if before is None or not isinstance(exponent, int | float):
        return None
    values = values_of(before)
    if exponent < 0 and not has_one_sign(values):
        return None
    values = values**exponent
    return of_values(before, values) if bool(values.isfinite().all()) else None


def has_one_sign(values: Tensor) -> bool:
    """Tell whether all values lie on one side of zero, and so may be divisors."""
    return bool((values > 0).all()) or bool((values < 0).all())


@register("prelu")
def prelu(propagation: Propagation, node: Node) -> Moments | None:
    """Apply `pointwise` with a slope for each channel."""
    before, slope = propagation.operand(node.args[0]), propagation.tensor(node.args[1])
    if before is None or slope is None:
        return None
    axes = propagation.axes(node.args[0])
    if slope.numel() > 1 and axes[min(1, len(axes) - 1)] != before.tree:
        return None
    slope = slope.double().reshape(-1, 1)
    return transformed(before, lambda z: torch.where(z > 0, z, slope * z))


def transformed(before: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Apply a function of each element, (channels, nodes) to (channels, nodes)."""
    return of_values(before, function(values_of(before)))


def values_of(moments: Moments) -> Tensor:
    """Return an activation at the quadrature nodes of its Gaussian variables."""
    if moments.origin is not None and moments.origin.values is not None:
        return moments.origin.values
    return quadrature_values(moments.mean, moments.std)


def of_values(before: Moments, values: Tensor) -> Moments:
    """Return the moments of another function of the variables behind an activation.

    The only variables behind a parameter are its own positions.
    """
    c = expanded(values)

    def covariance() -> tuple[Tensor, Tensor]:
        among = relation(before, before) if before.origin else before.correlated[0]
        assert among is not None
        return scaled_covariance(c, c, among)[:2]

    origin = before.derived()
    origin = None if origin is None else replace(origin, values=values)
    return Moments(before.tree, c[:, 0], covariance, origin)


def is_constant(moments: Moments) -> bool:
    if callable(moments.known) and moments.origin and moments.origin.values is not None:
        values = moments.origin.values
        return bool((values == values[:, :1]).all())
    return not moments.std.any()


def same_variables(x: Moments, y: Moments) -> bool:
    """Tell whether channel i of both is a function of the same Gaussian variable."""
    if x.origin is None or y.origin is None or x.tree != y.tree:
        return False
    a, b = x.origin.rows, y.origin.rows
    same_rows = a is b or (a is not None and b is not None and torch.equal(a, b))
    return x.origin.node is y.origin.node and same_rows


def cross_covariance(x: Moments, y: Moments) -> Tensor | None:
    """Return the covariance (n, m) of two activations; None if it is unknown."""
    among = relation(x, y)
    if among is None:
        return None
    return transformed_covariance(expanded(values_of(x)), expanded(values_of(y)), among)
