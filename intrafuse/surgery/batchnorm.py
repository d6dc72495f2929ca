"""Batch norm: fold it into the layer before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intrafuse.graph.groups import Norm
from intrafuse.graph.trace import ExampleInputs, trace
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

__all__ = ["fold_batchnorm", "fold_norms"]


@apart
def fold_batchnorm(
    model: nn.Module, example_inputs: ExampleInputs, *, remove: bool = False, inplace: bool = False
) -> nn.Module:
    """Fold every batch norm into the convolution or linear layer that feeds it.

    Args:
        model: the network; it is not changed unless `inplace`.
        example_inputs: what the network is traced with.
        remove: put `nn.Identity` where a norm was folded; else an identity batch norm stays,
            whose statistics can be estimated again later.
        inplace: change and return `model` itself.

    Returns:
        A network with the same evaluation outputs, up to rounding (1e-5). A norm without a layer
        to fold into (before an activation, say) becomes a scale and a shift.

    Raises:
        IntrafuseError: the model cannot be traced, or holds numbers that are not finite.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    >>> fold_batchnorm(net, torch.zeros(2, 2), remove=True)[1]
    Identity()
    """
    check_arguments(remove=remove, inplace=inplace)
    graph = trace(model, example_inputs)
    weights = Weights.of(graph, model)
    fold_norms(weights)
    folded = tuple(norm.name for norm in graph.norms if norm.layer is not None)
    return install(model, weights, remove=folded if remove else (), inplace=inplace)


def fold_norms(weights: Weights) -> None:
    """Fold every batch norm of a set of tensors, and note the statistics that it told.

    After this a norm has mean 0 and variance 1 - eps, unless it shares tensors with another or
    has no scale and shift to hold these. One that was folded also has weight 1 and bias 0, and
    `weights.statistics` holds mean and standard deviation of its layer's output.
    """
    for norm in weights.graph.own_norms:
        scale, shift = _affine(weights, norm)
        mean, variance = weights.state[norm.mean], weights.state[norm.variance]
        if norm.layer is not None:
            gamma = weights.state[norm.weight] if norm.weight else torch.ones_like(mean)
            beta = weights.state[norm.bias] if norm.bias else torch.zeros_like(mean)
            spread = gamma.abs() * (variance / (variance + norm.eps)).sqrt()
            weights.rescale(norm.layer, scale, shift)
            weights.statistics[norm.layer] = (beta, spread)
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        elif norm.weight is None or norm.bias is None:
            continue  # nothing can hold the scale and the shift: the statistics stay
        if norm.weight is not None:
            weights.state[norm.weight] = scale.to(mean)
        if norm.bias is not None:
            weights.state[norm.bias] = shift.to(mean)
        weights.state[norm.mean] = torch.zeros_like(mean)
        weights.state[norm.variance] = torch.full_like(variance, 1 - norm.eps)


def _affine(weights: Weights, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift (channels,) that a norm applies, in float64."""
    scale = (weights.state[norm.variance].double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * weights.state[norm.weight].double()
    shift = -weights.state[norm.mean].double() * scale
    if norm.bias is not None:
        shift = shift + weights.state[norm.bias].double()
    return scale, shift
