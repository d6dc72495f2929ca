"""Correlation between the taps of a kernel, and what it makes of a layer's weights.

Letters: W (outputs, inputs, taps) a layer's weight; K (taps, taps) the correlation of the input
between two taps, K = exp(-distance / length); Sigma (inputs, inputs) the input's covariance.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["as_taps", "output_variance", "tap_correlation", "weight_covariance"]


@cache
def tap_correlation(kernel: tuple[int, ...], length: float = 1.0) -> Tensor:
    """Return K (taps, taps) of a kernel's grid; neighbouring taps have correlation exp(-1/length).

    >>> tap_correlation((2,), 1.0).round(decimals=3)[0]
    tensor([1.0000, 0.3680], dtype=torch.float64)
    """
    axes = [torch.arange(n, dtype=torch.double) for n in kernel] or [torch.zeros(1).double()]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    distance = torch.cdist(grid, grid)
    return torch.exp(-distance / length) if length > 0 else (distance == 0).double()


def as_taps(weight: Tensor, output_axis: int, input_axis: int) -> Tensor:
    """Order a weight as (outputs, inputs, taps), float64."""
    front = weight.movedim((output_axis, input_axis), (0, 1)).double()
    return front.reshape(*front.shape[:2], -1)


def weight_covariance(taps: Tensor, kernel: Tensor) -> Tensor:
    """Covariance (outputs, outputs) of a layer's outputs for inputs of unit covariance.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
    """
    half = torch.linalg.cholesky(kernel + 1e-9 * torch.eye(len(kernel), dtype=kernel.dtype))
    rows = (taps @ half).flatten(1)
    return rows @ rows.T


def output_variance(taps: Tensor, kernel: Tensor, covariance: Tensor) -> Tensor:
    """Variance (outputs,) of a layer's outputs for inputs with a given covariance.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs).
    """
    mixed = torch.einsum("oit,ij->ojt", taps, covariance)
    return ((mixed @ kernel) * taps).sum((1, 2)).clamp_min(0)
