"""Regression with a ridge, from moments of samples.

Letters: x (groups, d) what is read, y (groups, outputs) what is wanted, W (groups, outputs, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafuse.graph.groups import Layer
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums

__all__ = ["Fits", "Regression", "ridge_solve"]


@dataclass(frozen=True, eq=False)
class Regression:
    """Moments of samples x (groups, d) and y (groups, outputs), in float64."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor  # variances only

    @classmethod
    def of(cls, sums: Sums, *, about_zero: bool) -> Regression:
        """Take the moments of y and x from sums, about zero if a layer cannot hold a bias."""
        xx, yx, yy = sums.covariance(1, 1), sums.covariance(0, 1), sums.variance(0)
        x, y = sums.mean(1), sums.mean(0)
        if about_zero:
            xx, yx, yy = xx + _outer(x, x), yx + _outer(y, x), yy + y.square()
            x, y = torch.zeros_like(x), torch.zeros_like(y)
        return cls(sums.count, x, y, xx, yx, yy)

    def joined(self, other: Regression) -> Regression:
        """Return the moments of both sets of samples."""
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        x, y = self.x - other.x, self.y - other.y
        return Regression(
            count,
            a * self.x + b * other.x,
            a * self.y + b * other.y,
            a * self.xx + b * other.xx + a * b * _outer(x, x),
            a * self.yx + b * other.yx + a * b * _outer(y, x),
            a * self.yy + b * other.yy + a * b * y.square(),
        )

    def error(self, weight: Tensor) -> float:
        """Return the mean error of W (groups, outputs, d), in units of the outputs' variance."""
        error = ((weight @ self.xx - 2 * self.yx) * weight).sum(-1) + self.yy
        known = self.yy > 1e-12 * self.yy.max()
        return float((error[known] / self.yy[known]).mean()) if known.any() else 0.0

    def single(self) -> Regression:
        """Return the same in float32, which is enough to choose by."""
        parts = (self.x, self.y, self.xx, self.yx, self.yy)
        return Regression(self.count, *(part.float() for part in parts))

    def left(self, weight: Tensor) -> Tensor:
        """Return the covariance (groups, outputs, d) with x that W leaves unexplained."""
        return self.yx - weight @ self.xx

    def step(self, left: Tensor, ridge: float) -> Tensor:
        """Return the correction (groups, outputs, d) of a weight that leaves this unexplained."""
        return ridge_solve(self.xx, left.mT, ridge).mT


def ridge_solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve with a covariance (..., d, d) and a ridge, in units of its mean diagonal.

    Rounding may have made the covariance indefinite. A covariance of zero gives zero.
    """
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(0)[..., None, None]
    scale = torch.where(level > 0, 1 / level.clamp_min(torch.finfo(level.dtype).tiny), 0.0)
    ridged = matrix * scale
    ridged.diagonal(dim1=-2, dim2=-1).add_(max(ridge, 1e-9))
    root, failed = torch.linalg.cholesky_ex(ridged)
    if failed.any():
        return torch.linalg.solve(ridged, right * scale)
    return torch.cholesky_solve(right * scale, root)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


@dataclass(frozen=True, eq=False)
class Fits:
    """Moments of the samples to solve with, of those held out, and of all.

    All are in float64, those that only choose in float32. `held` is None if samples are too few.
    """

    solving: Regression
    held: Regression | None
    whole: Regression

    @classmethod
    def of(cls, sums: Sequence[Sums], layer: Layer) -> Fits:
        """Take the moments from sums; refuse values that are not finite."""
        known = [Regression.of(s, about_zero=layer.bias is None) for s in sums if s.count]
        if not all(part.xx.isfinite().all() and part.yx.isfinite().all() for part in known):
            raise IntrafuseError("activations must be finite on the data", layer=layer.name)
        if not known:
            raise IntrafuseError("the data holds no sample", layer=layer.name)
        if len(known) == 1:
            return cls(known[0], None, known[0])
        solving, held = known
        return cls(solving.single(), held.single(), solving.joined(held))
