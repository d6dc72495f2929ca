"""Moments of activations from the weights alone: one rule for each operator.

A rule takes the moments of an operator's inputs to those of its result. Only the channel
dimension is described; all positions of a channel count alike. What no rule describes has no
moments (None), and readers of it keep the weights that conventional pruning gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import Sum, Tree, tree_size
from intrafuse.graph.rules import operator_name
from intrafuse.moments.gaussian import correlation, hermite_coefficients, transformed_covariance
from intrafuse.moments.taps import as_taps, tap_correlation, weight_covariance
from intrafuse.weights import Weights

__all__ = ["Moments", "Propagation", "register"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the channels of an activation.

    Attributes:
        tree: the channel axis: which atoms lie where.
        mean: (channels,), float64.
        covariance: (channels, channels), float64.
    """

    tree: Tree
    mean: Tensor
    covariance: Tensor


Rule = Callable[["Propagation", Node], Moments | None]
RULES: dict[str, Rule] = {}


def register(*operators: str) -> Callable[[Rule], Rule]:
    """Register the moment rule of one or more ATen operators."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return add


class Propagation:
    """The moments of every activation of a network, computed when asked for.

    Args:
        weights: the tensors. Where `weights.statistics` tells mean and standard deviation of a
            layer's output (a batch norm was folded into it), only its correlations are inferred.
        length: how far the correlation between neighbouring positions reaches.
    """

    def __init__(self, weights: Weights, *, length: float = 1.0) -> None:
        self.weights = weights
        self.length = length
        self.program = weights.graph.program
        self._known: dict[Node, Moments | None] = {}

    def of(self, node: Node) -> Moments | None:
        """Return the moments of an operator's result, None where no rule describes it."""
        stack = [node]
        while stack:  # no recursion: networks may be thousands of operators deep
            top = stack[-1]
            waiting = [n for n in _sources(self, top) if n not in self._known]
            if top in self._known or not waiting:
                stack.pop()
                if top not in self._known:
                    self._known[top] = self._compute(top)
            else:
                stack.extend(waiting)
        return self._known[node]

    def _compute(self, node: Node) -> Moments | None:
        if node.op == "placeholder":
            return _input(self, node)
        rule = RULES.get(operator_name(node)) if node.op == "call_function" else None
        return None if rule is None else rule(self, node)

    def tensor(self, value: object) -> Tensor | None:
        """Return the current value of a parameter or buffer, None for anything else."""
        name = self.program.parameters.get(value)
        return None if name is None else self.weights.state.get(name)

    def operand(self, value: object) -> Moments | None:
        """Return the moments of an operator's argument, None where it is no activation."""
        if not isinstance(value, Node) or value in self.program.parameters:
            return None
        return self.of(value)

    def size(self, tree: Tree) -> int:
        return tree_size(tree, self.weights.sizes)


def _sources(self: Propagation, node: Node) -> list[Node]:
    """List the activations that a node is computed from."""
    if node.op != "call_function":
        return []
    return [n for n in node.all_input_nodes if n not in self.program.parameters]


def _input(self: Propagation, node: Node) -> Moments | None:
    """Assume inputs of mean 0 and variance 1, without correlation."""
    axes = self.program.values.get(node)
    if not axes or node in self.program.parameters or len(axes) < 2:
        return None
    tree = axes[1]
    n = self.size(tree)
    return Moments(tree, torch.zeros(n).double(), torch.eye(n).double())


@register("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d")  # fmt: skip
def layer(self: Propagation, node: Node) -> Moments | None:
    """Infer correlations from the weights, for inputs without correlation between channels."""
    name = self.program.parameters.get(node.args[1])
    if name is None:
        return None
    found = self.weights.graph.layers[name]
    weight = self.weights.state[name]
    axes = self.program.values[node]
    tree = axes[-1] if found.operator == "linear" else axes[len(axes) - weight.dim() + 1]
    taps = as_taps(weight, found.output_axis, found.input_axis)
    if len(taps) != self.size(tree):  # a grouped transposed convolution
        return None
    before = self.operand(node.args[0])
    kernel = tap_correlation(tuple(weight.shape[2:]), self.length)
    if before is not None and weight.shape[found.input_axis] == len(before.mean):
        scale = before.covariance.diagonal().clamp_min(0).sqrt()
        mean = taps.sum(2) @ before.mean
    else:  # grouped or depthwise, or unknown: inputs of unit variance
        scale, mean = torch.ones(taps.shape[1]).double(), torch.zeros(len(taps)).double()
    told = self.weights.statistics.get(name)
    covariance = weight_covariance(taps if told is not None else taps * scale[:, None], kernel)
    bias = self.weights.state.get(found.bias) if found.bias is not None else None
    mean = mean + bias.double() if bias is not None else mean
    if told is not None:
        mean, std = told[0].double(), told[1].double()
        relation, _ = correlation(covariance)
        covariance = relation.fill_diagonal_(1.0) * std * std[:, None]
    return Moments(tree, mean, covariance)


@register("batch_norm")
def batch_norm(self: Propagation, node: Node) -> Moments | None:
    """Take mean and spread from the norm, and correlations from what enters it."""
    before = self.operand(node.args[0])
    if before is None:
        return None
    gamma, beta, running, spread = (self.tensor(value) for value in node.args[1:5])
    eps: Any = node.args[7] if len(node.args) > 7 else 1e-5
    if running is None or spread is None:
        return before
    scale = (spread.double() + eps).rsqrt() * (1 if gamma is None else gamma.double())
    shift = -running.double() * scale + (0 if beta is None else beta.double())
    if bool((running == 0).all()):  # folded into the layer before: an affine map
        return _affine(before, scale, shift)
    relation, _ = correlation(before.covariance)
    std = scale.abs() * spread.double().sqrt()
    signs = torch.sign(scale)
    relation = relation.fill_diagonal_(1.0) * signs * signs[:, None]
    return Moments(before.tree, scale * running.double() + shift, relation * std * std[:, None])


def _affine(before: Moments, scale: Tensor, shift: Tensor) -> Moments:
    covariance = before.covariance * scale * scale[:, None]
    return Moments(before.tree, before.mean * scale + shift, covariance)


@register("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish",
          "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "clamp",
          "log_sigmoid", "softsign", "square", "abs", "neg", "exp")  # fmt: skip
def pointwise(self: Propagation, node: Node) -> Moments | None:
    """Expand the function in Hermite polynomials of its Gaussian input."""
    before = self.operand(node.args[0])
    if before is None:
        return None
    function = getattr(torch.ops.aten, operator_name(node))  # never in place
    return _transform(before, lambda z: function(z, *node.args[1:], **node.kwargs))


@register("prelu")
def prelu(self: Propagation, node: Node) -> Moments | None:
    """As `pointwise`, with a slope for each channel."""
    before, slope = self.operand(node.args[0]), self.tensor(node.args[1])
    if before is None or slope is None:
        return None
    slope = slope.double().reshape(-1, 1)
    return _transform(before, lambda z: torch.where(z > 0, z, slope * z))


def _transform(before: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    relation, std = correlation(before.covariance)
    c = hermite_coefficients(function, before.mean, std)
    return Moments(before.tree, c[:, 0], transformed_covariance(c, c, relation))


@register("add", "sub")
def add(self: Propagation, node: Node) -> Moments | None:
    """Add means and covariances: the summands of a residual stream count as independent."""
    x, y = node.args[:2]
    sign = -1.0 if operator_name(node) == "sub" else 1.0
    first, second, parameter = self.operand(x), self.operand(y), self.tensor(y)
    if first is None or node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(y, int | float):
        return Moments(first.tree, first.mean + sign * float(y), first.covariance)
    if parameter is not None:
        shift = parameter.double().flatten()
        fits = len(shift) in (1, len(first.mean))
        return Moments(first.tree, first.mean + sign * shift, first.covariance) if fits else None
    if second is None or first.tree != second.tree:
        return None
    covariance = first.covariance + second.covariance
    return Moments(first.tree, first.mean + sign * second.mean, covariance)


@register("mul")
def mul(self: Propagation, node: Node) -> Moments | None:
    """Scale by a number or a parameter; multiply gates as independent variables."""
    x, y = node.args[:2]
    first, second, parameter = self.operand(x), self.operand(y), self.tensor(y)
    if first is None:
        return None
    if isinstance(y, int | float):
        return _affine(first, torch.full_like(first.mean, float(y)), torch.zeros_like(first.mean))
    if parameter is not None:
        scale = parameter.double().flatten()
        if len(scale) not in (1, len(first.mean)):
            return None
        return _affine(first, scale.expand(len(first.mean)), torch.zeros_like(first.mean))
    if second is None or second.tree != first.tree:
        return None
    a, b = first.covariance, second.covariance
    covariance = a * b
    covariance += a * torch.outer(second.mean, second.mean)
    covariance += b * torch.outer(first.mean, first.mean)
    return Moments(first.tree, first.mean * second.mean, covariance)


@register("cat")
def cat(self: Propagation, node: Node) -> Moments | None:
    """Put moments side by side, without correlation between the parts."""
    tensors, dim = (*node.args, 0)[:2]
    parts = [self.operand(n) for n in tensors] if isinstance(tensors, list | tuple) else []
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or dim not in (1, 1 - len(self.program.values[node])):
        return None
    return Moments(
        Sum(tuple(part.tree for part in known)),
        torch.cat([part.mean for part in known]),
        torch.block_diag(*(part.covariance for part in known)),
    )


@register("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
          "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
          "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mean", "flatten",
          "view", "reshape", "dropout", "feature_dropout", "contiguous", "clone", "to",
          "upsample_nearest2d", "upsample_bilinear2d", "detach", "pad", "slice")  # fmt: skip
def unchanged(self: Propagation, node: Node) -> Moments | None:
    """Keep the moments: what changes all channels alike cancels in every readout."""
    before = self.operand(node.args[0])
    axes = self.program.values[node]
    if before is None or not any(_holds(tree, before.tree) for tree in axes):
        return None
    return before


def _holds(tree: Tree, inner: Tree) -> bool:
    if tree == inner:
        return True
    if isinstance(tree, int):
        return False
    children = tree.parts if isinstance(tree, Sum) else tree.factors
    return any(_holds(child, inner) for child in children)
