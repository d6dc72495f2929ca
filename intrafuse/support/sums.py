"""Sums of samples, of which means, variances and covariances are made."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Sums"]


class Sums:
    """Streaming first and second moments of samples, summed in float64.

    They are taken about the mean of the first samples: products are of the samples' own type, and
    those of values far from zero would drown the variance. Results lie in the CPU's memory.

    Args:
        pairs: for which parts of a sample to sum products, as (0, 1) for the first two.

    Attributes:
        count: samples so far.
        additions: calls of `add` so far.

    >>> import torch
    >>> sums = Sums()
    >>> sums.add(torch.tensor([[1.0], [3.0]]))
    >>> sums.add(torch.tensor([[8.0]]))
    >>> sums.mean().item(), round(sums.variance().item(), 3)
    (4.0, 8.667)
    """

    def __init__(self, *pairs: tuple[int, int]) -> None:
        self.count = 0
        self.additions = 0
        self._pairs = pairs
        self._origin: list[Tensor] = []
        self._first: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._products: list[Tensor] = []

    def add(self, *parts: Tensor) -> None:
        """Add samples, whose parts are (..., samples, n), (..., samples, m) and so on."""
        self.additions += 1
        if not parts[0].shape[-2]:
            return
        self.count += parts[0].shape[-2]
        self._origin = self._origin or [part.mean(-2) for part in parts]
        apart = [
            part - origin[..., None, :] for part, origin in zip(parts, self._origin, strict=True)
        ]
        self._first = _added(self._first, [part.sum(-2) for part in apart])
        self._squares = _added(self._squares, [part.square().sum(-2) for part in apart])
        products = [apart[i].mT @ apart[j] for i, j in self._pairs]
        self._products = _added(self._products, products)

    def mean(self, part: int = 0) -> Tensor:
        """Return the mean (..., n) of a part, float64."""
        return self._first[part] / self.count + self._origin[part].double().cpu()

    def variance(self, part: int = 0) -> Tensor:
        """Return the variance (..., n) of a part, float64."""
        mean = self._first[part] / self.count
        return (self._squares[part] / self.count - mean.square()).clamp_min(0)

    def covariance(self, first: int, second: int) -> Tensor:
        """Return the covariance (..., n, m) of a pair of parts, float64."""
        x, y = (self._first[part] / self.count for part in (first, second))
        whole = self._products[self._pairs.index((first, second))] / self.count
        return whole - x[..., :, None] * y[..., None, :]


def _added(totals: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    terms = [term.double().cpu() for term in terms]
    return [a + b for a, b in zip(totals, terms, strict=True)] if totals else terms
