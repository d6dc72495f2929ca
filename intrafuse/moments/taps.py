"""Correlation between the taps of a kernel, and the output covariance that follows from it.

Letters: W (outputs, inputs, taps) a layer's weight; K (taps, taps) the correlation of the input
between two taps, K = exp(-distance / length); Sigma (inputs, inputs) the input's covariance.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "as_taps",
    "grouped_covariance",
    "grouped_taps",
    "output_variance",
    "phase_correlation",
    "root",
    "tap_correlation",
    "weight_covariance",
]


LARGE = 40  # weights with a larger binary exponent are scaled before float32 squares them


@cache
def tap_correlation(kernel: tuple[int, ...], length: float = 1.0) -> Tensor:
    """Return K (taps, taps) of a kernel's grid; neighboring taps have correlation exp(-1/length).

    >>> tap_correlation((2,), 1.0).round(decimals=3)[0]
    tensor([1.0000, 0.3680], dtype=torch.float64)
    """
    grid = _grid(kernel)
    distance = torch.cdist(grid, grid)
    return torch.exp(-distance / length) if length > 0 else (distance == 0).double()


def _grid(kernel: tuple[int, ...]) -> Tensor:
    """Return the coordinates (taps, dimensions) of a kernel's taps."""
    axes = [torch.arange(n, dtype=torch.double) for n in kernel] or [torch.zeros(1).double()]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


@cache
def phase_correlation(
    kernel: tuple[int, ...], stride: tuple[int, ...], length: float = 1.0
) -> Tensor:
    """Return K (taps, taps) of a transposed convolution, averaged over its output positions.

    One tap in prod(stride) writes each position: the taps of one phase. Their distance in the
    input is their distance in the kernel divided by the stride.

    >>> phase_correlation((2,), (2,))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    step = torch.tensor(stride, dtype=torch.double)
    apart = (_grid(kernel)[:, None] - _grid(kernel)) / step
    distance = apart.norm(dim=2)
    met = torch.exp(-distance / length) if length > 0 else (distance == 0).double()
    return met * (apart == apart.round()).all(2) / step.prod()


def as_taps(weight: Tensor, output_axis: int, input_axis: int) -> Tensor:
    """Order a weight as (outputs, inputs, taps), float64."""
    front = weight.movedim((output_axis, input_axis), (0, 1)).double()
    return front.reshape(*front.shape[:2], -1)


def grouped_taps(weight: Tensor, groups: int, *, transposed: bool = False) -> Tensor:
    """Order a grouped weight as (outputs, inputs of one group, taps), float64."""
    if transposed:  # (groups x inputs, outputs of one group, kernel...)
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.double().reshape(*weight.shape[:2], -1)


def root(kernel: Tensor) -> Tensor:
    """Return a root L of a correlation K = L L^T (taps, taps)."""
    return torch.linalg.cholesky(kernel + 1e-9 * torch.eye(len(kernel), dtype=kernel.dtype))


def weight_covariance(taps: Tensor, kernel: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Compute the covariance (outputs, outputs) of a layer's outputs.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs); by default the identity.
    """
    rows = taps @ root(kernel)
    # This product dominates the time, and float32 is accurate enough for correlations.
    level = 2.0 ** max(0, math.frexp(float(rows.abs().max()))[1] - LARGE)
    rows = (rows / level).float()
    mixed = rows if covariance is None else torch.einsum("oit,ij->ojt", rows, covariance.float())
    found = (mixed.flatten(1) @ rows.flatten(1).T).double() * level**2
    return (found + found.T) / 2


def grouped_covariance(taps: Tensor, kernel: Tensor, covariance: Tensor) -> Tensor:
    """Compute the covariance (outputs, outputs) of a grouped convolution's outputs.

    With one input in each group (depthwise) it is (W K W^T) * Sigma, element by element.

    Args:
        taps: W (outputs, inputs of one group, taps); outputs of one group are contiguous.
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs), of all groups.
    """
    n, own, _ = taps.shape
    groups = len(covariance) // own
    rows = taps @ root(kernel)
    if own == 1:
        if n > groups:
            each = n // groups
            covariance = covariance.repeat_interleave(each, 0).repeat_interleave(each, 1)
        return (rows[:, 0] @ rows[:, 0].T).mul_(covariance)
    rows = rows.unflatten(0, (groups, -1))
    blocks = covariance.reshape(groups, own, -1)
    total = torch.zeros(n, n, dtype=covariance.dtype)
    for tap in rows.unbind(3):  # one tap at a time, to save memory: thousands of outputs, 49 taps
        left = (tap @ blocks).reshape(n, groups, own)
        total += torch.einsum("xhj,hpj->xhp", left, tap).reshape(n, n)
    return total


def output_variance(taps: Tensor, kernel: Tensor, covariance: Tensor) -> Tensor:
    """Compute the variance (outputs,) of a layer's outputs for a given input covariance.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs).
    """
    mixed = torch.einsum("oit,ij->ojt", taps, covariance)
    return ((mixed @ kernel) * taps).sum((1, 2)).clamp_min(0)
