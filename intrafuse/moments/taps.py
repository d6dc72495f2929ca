"""Correlation between the taps of a kernel, and the output covariance that follows from it.

Letters: W (outputs, inputs, taps) a layer's weight; K (taps, taps) the correlation of the input
between two taps, K = exp(-distance / length); Sigma (inputs, inputs) the input's covariance.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from intrafuse.moments.gaussian import WIDE, correlation

__all__ = [
    "as_taps",
    "decoded",
    "grouped_covariance",
    "grouped_taps",
    "output_variance",
    "phase_correlation",
    "root",
    "tap_correlation",
    "weight_correlation",
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
    """Order a weight as (outputs, inputs, taps), in float32 or better."""
    front = weight.movedim((output_axis, input_axis), (0, 1))
    return front.reshape(*front.shape[:2], -1).to(torch.promote_types(weight.dtype, torch.float32))


def grouped_taps(weight: Tensor, groups: int, *, transposed: bool = False) -> Tensor:
    """Order a grouped weight as (outputs, inputs of one group, taps), float64."""
    if transposed:  # (groups x inputs, outputs of one group, kernel...)
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.double().reshape(*weight.shape[:2], -1)


def root(kernel: Tensor) -> Tensor:
    """Return a root L of a correlation K = L L^T (taps, taps)."""
    return torch.linalg.cholesky(kernel + 1e-9 * torch.eye(len(kernel), dtype=kernel.dtype))


def weight_correlation(
    taps: Tensor, kernel: Tensor, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute correlation (outputs, outputs) and deviation (outputs,) of a layer's outputs.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs); by default the identity.
    """
    # These products dominate the time, and float32 is accurate enough for correlations.
    rows, level = _float32(root(kernel).T.to(taps) @ taps.mT)  # (outputs, taps, inputs)
    mixed = rows
    if covariance is not None:
        part, size = _float32(covariance)
        mixed, level = rows @ part, level * size**0.5
    found = mixed.flatten(1) @ rows.flatten(1).T
    among, std = correlation((found + found.T).mul_(0.5))
    return among, std.double() * level


def _float32(x: Tensor) -> tuple[Tensor, float]:
    """Return numbers that float32 can square, and the power of four that they were divided by."""
    low, high = x.aminmax()
    excess = math.frexp(float(max(high, -low)))[1] - LARGE
    level = 4.0 ** max(0, (excess + 1) // 2)
    return (x if level == 1 else x / level).float(), level


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


def decoded(taps: Tensor, matrix: Tensor) -> Tensor:
    """Multiply W (outputs, n, taps) by Q (n, m): (outputs, m, taps), float64."""
    rows, level = taps.mT, 1.0  # (outputs, taps, n)
    if len(matrix) >= WIDE:
        (rows, level), (matrix, size) = _float32(rows), _float32(matrix)
        level *= size
    return (rows @ matrix.to(rows)).mT.double() * level


def output_variance(taps: Tensor, kernel: Tensor, covariance: Tensor) -> Tensor:
    """Compute the variance (outputs,) of a layer's outputs for a given input covariance.

    Args:
        taps: W (outputs, inputs, taps).
        kernel: K (taps, taps).
        covariance: Sigma (inputs, inputs).
    """
    rows, level = taps.mT.contiguous(), 1.0  # (outputs, taps, inputs)
    if len(covariance) >= WIDE:
        (rows, level), (covariance, size) = _float32(rows), _float32(covariance)
        level *= size**0.5
    mixed = kernel.to(rows) @ (rows @ covariance)
    found = mixed.mul_(rows).sum((1, 2), dtype=torch.float64)
    return found.mul_(level**2).clamp_min(0)
