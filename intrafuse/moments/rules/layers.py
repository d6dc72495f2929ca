"""Moment rules for layers with weights: convolution, linear, embedding; and for pairs of these."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import Product, Sum, Tree
from intrafuse.graph.groups import Layer
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.moments.gaussian import WIDE, correlation
from intrafuse.moments.propagate import Moments, Origin, Propagation, register
from intrafuse.moments.taps import (
    as_taps,
    grouped_covariance,
    grouped_taps,
    phase_correlation,
    root,
    tap_correlation,
    weight_correlation,
)

__all__ = ["relation"]


@register("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d")  # fmt: skip
def layer(propagation: Propagation, node: Node) -> Moments | None:
    """Infer correlations from the weights and from a part of those of the inputs.

    Channels of different groups of a grouped (or depthwise) convolution share no input. They are
    as correlated as their inputs, so the whole covariance of the input is used there. Where the
    input is unknown, it has mean 0 and variance 1. Padding is ignored.
    """
    name = propagation.program.parameter(node.args[1])
    found = propagation.weights.graph.layers.get(name)
    if found is None:
        return None
    tree = propagation.axes(node)[_channel_dim(propagation, node, found)]
    before = propagation.operand(node.args[0])
    told = propagation.weights.statistics.get(name)
    if told is not None and len(told[0]) != propagation.size(tree):
        told = None  # they do not follow the merged groups of a transposed convolution
    if _groups(propagation, node, found, tree) == 1:
        taps, kernel, before = _dense(propagation, node, found, before)
        scale, mean = _input_scale(taps, before)
        weight = propagation.weights.state[found.weight]
        lines = partial(_unit_rows, weight, found, kernel, scale)
        known = weight_correlation(taps, kernel, _inputs(propagation, before, found.weight, taps))
        mean = _tap_sum(node, found, taps).double() @ mean
    else:
        mean, covariance = _grouped(propagation, node, found, tree, before)
        known, lines = correlation(covariance), None
    bias = propagation.weights.state.get(found.bias) if found.bias is not None else None
    mean = mean + bias.double() if bias is not None else mean
    if told is not None:
        mean, std = told[0].double(), told[1].double()
        known = known[0].fill_diagonal_(1.0), std
    return Moments(tree, mean, known, Origin(node, lines=lines))


def _channel_dim(propagation: Propagation, node: Node, found: Layer) -> int:
    return -1 if found.operator == "linear" else 1 - propagation.weights.state[found.weight].dim()


def _transposed(found: Layer) -> bool:
    return found.operator.startswith("conv_transpose")


def _groups(propagation: Propagation, node: Node, found: Layer, tree: Tree) -> int:
    """Count the groups at the current sizes, as whole groups may be removed or added."""
    if found.operator == "linear":
        return 1
    weight = propagation.weights.state[found.weight]
    if _transposed(found):
        return propagation.size(tree) // weight.shape[1]
    read = propagation.axes(node.args[0])[_channel_dim(propagation, node, found)]
    return propagation.size(read) // weight.shape[1]


def _kernel(propagation: Propagation, node: Node, found: Layer) -> Tensor:
    kernel = tuple(propagation.weights.state[found.weight].shape[2:])
    stride = _stride(node, found)
    if max(stride, default=1) == 1:
        return tap_correlation(kernel, propagation.length)
    return phase_correlation(kernel, stride, propagation.length)


def _stride(node: Node, found: Layer) -> tuple[int, ...]:
    """Return the stride of a transposed convolution; other strides do not affect moments."""
    return tuple(arguments(node)["stride"]) if _transposed(found) else ()


def _tap_sum(node: Node, found: Layer, taps: Tensor) -> Tensor:
    """Sum the taps that write one output position, on average over the positions."""
    total = taps.sum(2)
    for step in _stride(node, found):
        total = total / step
    return total


def _dense(
    propagation: Propagation, node: Node, found: Layer, before: Moments | None
) -> tuple[Tensor, Tensor, Moments | None]:
    """Return W (outputs, inputs, taps), K (taps, taps), and the input's moments if they fit.

    The positions of a flattened map behind a channel are the taps of a linear layer.
    """
    weight = propagation.weights.state[found.weight]
    taps, kernel = (
        as_taps(weight, found.output_axis, found.input_axis),
        _kernel(propagation, node, found),
    )
    if before is None:
        return taps, kernel, None
    read = propagation.axes(node.args[0])[_channel_dim(propagation, node, found)]
    behind = _behind(read, before.tree)
    if behind is None or (behind and weight.dim() > 2):
        return taps, kernel, None
    if behind:
        taps = taps.reshape(len(taps), len(before.mean), -1)
        kernel = tap_correlation(tuple(map(propagation.size, behind)), propagation.length)
    return taps, kernel, before


def _behind(tree: Tree, channels: Tree) -> tuple[Tree, ...] | None:
    """List the factors after the channel factor of an axis; None for any other axis."""
    if tree == channels:
        return ()
    if isinstance(tree, Sum):
        if not isinstance(channels, Sum) or len(channels.parts) != len(tree.parts):
            return None
        found = {_behind(*pair) for pair in zip(tree.parts, channels.parts, strict=True)}
        return found.pop() if len(found) == 1 else None
    if isinstance(tree, Product):
        front = channels.factors if isinstance(channels, Product) else (channels,)
        if tree.factors[: len(front)] == front:
            return tree.factors[len(front) :]
    return None


def _input_scale(taps: Tensor, before: Moments | None) -> tuple[Tensor, Tensor]:
    """Return standard deviations and means (inputs,) of a layer's inputs."""
    if before is None:
        return torch.ones(taps.shape[1]).double(), torch.zeros(taps.shape[1]).double()
    return before.std, before.mean


def _inputs(
    propagation: Propagation, before: Moments | None, name: str, taps: Tensor
) -> Tensor | None:
    """Return the covariance (inputs, inputs) that a dense layer's rule assumes.

    Inferred correlations are only partly right, and a fraction of them works better than all or
    none. If a batch norm tells the variance of the outputs, equal input variances work better than
    inferred ones. They are set to the mean over the inputs that are read, so channels appended for
    comparison change nothing.
    """
    if before is None:
        return None
    own = before.covariance.diagonal().clamp_min(0)
    normed = any(norm.layer == name for norm in propagation.weights.graph.norms)
    read = (taps != 0).any(2).any(0)
    base = torch.full_like(own, float(own[read].mean())) if normed and read.any() else own
    part = propagation.correlated * before.covariance
    part.diagonal().copy_(base + propagation.correlated * (own - base))
    return part


def _grouped(
    propagation: Propagation, node: Node, found: Layer, tree: Tree, before: Moments | None
) -> tuple[Tensor, Tensor]:
    read = propagation.axes(node.args[0])[_channel_dim(propagation, node, found)]
    inputs, groups = propagation.size(read), _groups(propagation, node, found, tree)
    if before is None or before.tree != read:
        before = Moments(read, torch.zeros(inputs).double(), torch.eye(inputs).double())
    taps = grouped_taps(
        propagation.weights.state[found.weight], groups, transposed=_transposed(found)
    )
    total = _tap_sum(node, found, taps).unflatten(0, (groups, -1))
    mean = (total @ before.mean.reshape(groups, -1, 1)).flatten()
    kernel = _kernel(propagation, node, found)
    return mean, grouped_covariance(taps, kernel, before.covariance)


def relation(x: Moments, y: Moments) -> Tensor | None:
    """Correlate the Gaussian variables behind two activations.

    Returns:
        (n, m); None where nothing is known, which counts as independence.
    """
    first, second = x.derived(), y.derived()
    if first is None or second is None:
        return None
    if first.node is second.node:
        assert first.base is not None
        found = first.base.correlated[0]
    else:
        found = _between_layers(first, second)
    if found is not None and first.rows is not None:
        found = found[first.rows]
    if found is not None and second.rows is not None:
        found = found[:, second.rows]
    return found


def _between_layers(first: Origin, second: Origin) -> Tensor | None:
    """Correlate the outputs of two layers of the same kind that read the same activation."""
    x, y = first.node, second.node
    alike = operator_name(x) == operator_name(y) and x.args[3:] == y.args[3:]
    if first.lines is None or second.lines is None or not alike or x.args[:1] != y.args[:1]:
        return None
    left, right = first.lines(), second.lines()
    return left @ right.T if left.shape[1] == right.shape[1] else None


def _unit_rows(weight: Tensor, found: Layer, kernel: Tensor, scale: Tensor) -> Tensor:
    """Write the outputs of a layer, whose inputs deviate by `scale`, as unit vectors."""
    taps = as_taps(weight, found.output_axis, found.input_axis).reshape(-1, len(scale), len(kernel))
    lines = (taps * scale[:, None] @ root(kernel)).flatten(1)
    lines = torch.nn.functional.normalize(lines, dim=1, eps=1e-150)
    return lines if len(lines) < WIDE else lines.float()


@register("embedding")
def embedding(propagation: Propagation, node: Node) -> Moments | None:
    """Take mean and covariance over the rows of the weight, with equal weights."""
    weight = propagation.tensor(node.args[0])
    if weight is None:
        return None
    mean = weight.double().mean(0)
    squares = torch.zeros(len(mean), len(mean)).double()
    for words in weight.split(4096):  # to save memory: a vocabulary in float64 is large
        centred = words.double() - mean
        squares += centred.T @ centred
    return Moments(propagation.axes(node)[-1], mean, squares / len(weight))
