"""Fold batch norm into the preceding layer."""

from __future__ import annotations

from torch import nn

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
        example_inputs: inputs to trace the network with.
        remove: replace folded norms by `nn.Identity`; otherwise identity batch norms stay, whose
            statistics can be re-estimated later.
        inplace: change and return `model` itself.

    Returns:
        A network with the same evaluation outputs, up to rounding (1e-5). A norm that follows no
        layer (for example a norm at the input) becomes a scale and a shift.

    Raises:
        IntrafuseError: the model cannot be traced, or holds numbers that are not finite.

    >>> import torch
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
    """Fold every batch norm of a set of tensors, and note the statistics that it tells.

    Afterwards a norm has mean 0 and variance 1 - eps, unless it shares tensors with another norm,
    or follows no layer and has no scale and shift. A norm that follows a layer also has weight 1
    and bias 0, and `weights.statistics` holds mean and standard deviation of the layer's output.
    """
    for norm in weights.graph.own_norms:
        weights.fold(norm)
