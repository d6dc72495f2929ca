"""Moment rules for functions of each element, by Hermite expansion of Gaussian variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.rules import operator_name
from intrafuse.moments.gaussian import expanded, quadrature_values, transformed_covariance
from intrafuse.moments.propagate import Moments, Propagation, register
from intrafuse.moments.rules.layers import relation

__all__ = ["cross_covariance", "of_values", "transformed", "values_of"]


@register("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "rrelu",
          "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "clamp",
          "clamp_min", "clamp_max", "log_sigmoid", "threshold", "softshrink", "hardshrink",
          "tanhshrink", "square", "abs", "neg", "exp", "erf", "sin", "cos", "atan")  # fmt: skip
def pointwise(self: Propagation, node: Node) -> Moments | None:
    """Expand the function in Hermite polynomials of the Gaussian variable behind its input."""
    before = self.operand(node.args[0])
    rest = node.args[1:]
    if before is None or any(isinstance(value, Node) for value in (*rest, *node.kwargs.values())):
        return None
    function = getattr(torch.ops.aten, operator_name(node))  # never in place
    return transformed(self, before, lambda z: function(z, *rest, **node.kwargs))


@register("pow")
def power(self: Propagation, node: Node) -> Moments | None:
    """As `pointwise`, for whole exponents: others are not defined below zero."""
    before, exponent = self.operand(node.args[0]), node.args[1]
    if before is None or not isinstance(exponent, int | float):
        return None
    if exponent < 0 or exponent != int(exponent):
        return None
    return transformed(self, before, lambda z: z**exponent)


@register("prelu")
def prelu(self: Propagation, node: Node) -> Moments | None:
    """As `pointwise`, with a slope for each channel."""
    before, slope = self.operand(node.args[0]), self.tensor(node.args[1])
    if before is None or slope is None:
        return None
    axes = self.axes(node.args[0])
    if slope.numel() > 1 and axes[min(1, len(axes) - 1)] != before.tree:
        return None
    slope = slope.double().reshape(-1, 1)
    return transformed(self, before, lambda z: torch.where(z > 0, z, slope * z))


def transformed(
    self: Propagation, before: Moments, function: Callable[[Tensor], Tensor]
) -> Moments:
    """Apply a function of each element, (channels, nodes) to (channels, nodes)."""
    return of_values(self, before, function(values_of(before)))


def values_of(moments: Moments) -> Tensor:
    """Return an activation at the quadrature nodes of its Gaussian variables."""
    if moments.origin is not None and moments.origin.values is not None:
        return moments.origin.values
    std = moments.covariance.diagonal().clamp_min(0).sqrt()
    return quadrature_values(moments.mean, std)


def of_values(self: Propagation, before: Moments, values: Tensor) -> Moments:
    """Return the moments of another function of the variables behind an activation."""
    assert before.origin is not None
    origin = replace(before.origin, values=values)
    among = relation(self, origin, origin)
    assert among is not None
    c = expanded(values)
    return Moments(before.tree, c[:, 0], transformed_covariance(c, c, among), origin)


def cross_covariance(self: Propagation, x: Moments, y: Moments) -> Tensor | None:
    """Covariance (n, m) of two activations; None where nothing is known of it."""
    if x.origin is None or y.origin is None:
        return None
    among = relation(self, x.origin, y.origin)
    if among is None:
        return None
    return transformed_covariance(expanded(values_of(x)), expanded(values_of(y)), among)
