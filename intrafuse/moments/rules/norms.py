"""Moment rules for normalization: mean and deviation from its parameters, the rest from input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import Tree
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.normed import norm_after
from intrafuse.graph.rules.registry import CASTS
from intrafuse.moments.propagate import Moments, Propagation, register

__all__ = ["norm_by_hand", "signed"]

# What stands between the mean of squares and the division by its root.
UNDER = CASTS | {"add", "sqrt", "rsqrt", "reciprocal", "pow"}


@register("batch_norm", "instance_norm")
def batch_norm(propagation: Propagation, node: Node) -> Moments | None:
    """Take mean and deviation from the norm, and correlations from its input.

    Without running statistics each channel is normalized by its own: mean beta, deviation gamma.
    """
    args = arguments(node)
    before, tree = propagation.operand(args["input"]), propagation.axes(args["input"])[1]
    gamma, beta, running, spread = (
        propagation.tensor(args[name]) for name in ("weight", "bias", "running_mean", "running_var")
    )
    if running is None or spread is None or args.get("use_input_stats", False):
        return _normalized(propagation, before, tree, gamma, beta, propagation.axes(node)[1])
    scale = (spread.double() + args["eps"]).rsqrt() * (1 if gamma is None else gamma.double())
    shift = -running.double() * scale + (0 if beta is None else beta.double())
    if before is not None and before.tree != tree:
        before = None
    if propagation.program.parameter(args["running_mean"]) in propagation.weights.folded:
        if before is None:  # it only scales and shifts its input
            return None
        among, std = before.correlated
        mean, std = before.mean * scale + shift, std * scale.abs()
    else:
        among = torch.eye(len(scale)).double() if before is None else before.correlated[0].clone()
        mean, std = scale * running.double() + shift, scale.abs() * spread.double().sqrt()
        among.fill_diagonal_(1.0)
    return Moments(propagation.axes(node)[1], mean, (signed(among, scale), std))


def signed(among: Tensor, scale: Tensor) -> Tensor:
    """Give correlations (n, n) the signs of the factors (n,) that scale the variables."""
    signs = scale.sign().to(among)
    return among if bool((signs == 1).all()) else (among * signs).mul_(signs[:, None])


@register("group_norm")
def group_norm(propagation: Propagation, node: Node) -> Moments | None:
    """Assume equal statistics for all channels of a group: mean beta, deviation gamma."""
    args = arguments(node)
    before, tree = propagation.operand(args["input"]), propagation.axes(args["input"])[1]
    gamma, beta = propagation.tensor(args["weight"]), propagation.tensor(args["bias"])
    return _normalized(propagation, before, tree, gamma, beta, propagation.axes(node)[1])


@register("layer_norm", "rms_norm")
def layer_norm(propagation: Propagation, node: Node) -> Moments | None:
    """Describe the first normalized axis; over the others, gamma and beta are averaged.

    Before gamma, the channels of a layer norm sum to zero and have mean square one over all
    channels. The input decides how the variance is shared among them. Their means are taken as
    beta, because means of a residual stream, inferred layer upon layer, are worse than none
    (measured: docs/research.md). RMS norm tells the second moment, gamma squared; the input
    decides which part of it is the mean.
    """
    args = arguments(node)
    rank = len(args["normalized_shape"])
    before, tree = propagation.operand(args["input"]), propagation.axes(args["input"])[-rank]
    gamma, beta = propagation.tensor(args["weight"]), propagation.tensor(args.get("bias"))
    if operator_name(node) == "layer_norm":
        if rank == 1 and before is not None and before.tree == tree:
            return _shared(
                _centred(before), gamma, beta, float(args["eps"]), propagation.axes(node)[-1]
            )
        return _normalized(propagation, before, tree, gamma, beta, propagation.axes(node)[-rank])
    eps = torch.finfo(torch.float32).eps if args["eps"] is None else args["eps"]
    return _root_mean_square(
        propagation, before, tree, gamma, float(eps), propagation.axes(node)[-rank]
    )


def norm_by_hand(propagation: Propagation, node: Node) -> Moments | None:
    """Describe a hand-written RMS norm, before its weight; None for other operators.

    Args:
        node: a product or a quotient.
    """
    for operand, other in (node.args[:2], node.args[1::-1]):
        at, eps = operand, 0.0
        while isinstance(at, Node) and operator_name(at) in UNDER:
            if operator_name(at) == "add":
                eps = sum(float(n) for n in at.args if isinstance(n, int | float))
            at = at.all_input_nodes[0]
        if isinstance(at, Node) and operator_name(at) == "mean" and norm_after(at) is node:
            (dim,) = arguments(at)["dim"]
            tree = propagation.axes(other)[dim]
            before = propagation.operand(other)
            return _root_mean_square(
                propagation, before, tree, None, eps, propagation.axes(node)[dim]
            )
    return None


def _root_mean_square(
    propagation: Propagation,
    before: Moments | None,
    tree: Tree,
    gamma: Tensor | None,
    eps: float,
    result: Tree,
) -> Moments:
    """Set the second moment of each channel to gamma squared, reduced by eps for small inputs."""
    found = _normalized(propagation, before, tree, gamma, None, result)
    if before is None or before.tree != tree:
        return found
    power = before.mean.square() + before.std.square()
    share = torch.where(power > 0, before.mean / power.clamp_min(1e-300).sqrt(), 0.0)
    rest = (1 - share.square()).clamp_min(0).sqrt()
    level = (power.mean() / (power.mean() + eps).clamp_min(1e-300)).sqrt()
    mean = level * share * _levels(gamma, len(share))
    among, std = found.correlated
    return Moments(result, mean, (among, level * rest * std))


def _normalized(
    propagation: Propagation,
    before: Moments | None,
    tree: Tree,
    gamma: Tensor | None,
    beta: Tensor | None,
    result: Tree,
) -> Moments:
    """Set mean beta and deviation gamma for the channels of an axis; zero for constant channels.

    Correlations come from the input, if it is described along the same axis.
    """
    n = propagation.size(tree)
    if before is None or before.tree != tree:
        among = torch.eye(n).double()
    else:
        among, _ = before.correlated
    scale = _levels(gamma, n)
    return Moments(result, _offsets(beta, n), (signed(among, scale), scale.abs()))


def _shared(
    before: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float, result: Tree
) -> Moments:
    """Scale the mean variance of all channels to one; each channel keeps its share."""
    n = len(before.mean)
    level = before.covariance.diagonal().clamp_min(0).mean() + eps
    scale = _levels(gamma, n) / level.clamp_min(1e-300).sqrt()
    return Moments(result, _offsets(beta, n), before.covariance * scale * scale[:, None])


def _offsets(beta: Tensor | None, n: int) -> Tensor:
    """Return beta (n,), averaged over positions."""
    return torch.zeros(n).double() if beta is None else beta.double().reshape(n, -1).mean(1)


def _levels(gamma: Tensor | None, n: int) -> Tensor:
    """Return gamma (n,): the root mean square over positions, with the sign of the mean."""
    if gamma is None:
        return torch.ones(n).double()
    lines = gamma.double().reshape(n, -1)
    if lines.shape[1] == 1:
        return lines[:, 0]
    return lines.square().mean(1).sqrt() * lines.mean(1).sign()


def _centred(before: Moments) -> Moments:
    """Subtract the mean over the channels from every channel."""
    covariance = before.covariance
    rows = covariance.mean(0)
    found = covariance - rows - rows[:, None] + rows.mean()
    floor = 1e-12 * covariance.diagonal().amax()
    still = found.diagonal() <= floor  # the rest of a constant channel is rounding
    found[still] = 0.0
    found[:, still] = 0.0
    return Moments(before.tree, before.mean - before.mean.mean(), found)
