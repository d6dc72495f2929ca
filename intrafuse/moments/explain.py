"""Which channels explain what the readers of a group read, and how much stays unexplained.

Pivoted Cholesky of the covariance Sigma (n, n) that each reader knows: taking channel j explains
Sigma[:, j] Sigma[j, :] / Sigma[j, j] of it. A channel i weighs as the squared norm of the weights
(outputs, n, taps) that read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intrafuse.moments.readers import Reading

__all__ = ["explaining_channels", "unexplained"]


def explaining_channels(found: Sequence[Reading], width: int) -> Tensor:
    """Choose, one after the other, the channel that explains most of what the readers read.

    Args:
        found: what each reader knows of the group; its `old` covariance is used.
        width: m.

    Returns:
        Ascending indices (m,).
    """
    return torch.tensor(sorted(_pivots(found, width)[0]))


def unexplained(found: Sequence[Reading]) -> np.ndarray:
    """Compute the share of each reader's variance that the best m channels leave unexplained.

    Args:
        found: what each reader knows of the group.

    Returns:
        (n + 1, readers), falling from 1 for m = 0 to 0 for m = n.
    """
    return _pivots(found, len(found[0].old_mean))[1]


def _pivots(found: Sequence[Reading], width: int) -> tuple[list[int], np.ndarray]:
    """Return channels in the order chosen, and shares (width + 1, readers) left unexplained."""
    left = [reading.old.numpy().copy() for reading in found]
    weight = []
    for reading, covariance in zip(found, left, strict=True):
        squares = reading.taps.square().sum((0, 2)).numpy()
        total = float(squares @ np.diag(covariance))
        weight.append(squares / total if total > 0 else np.zeros_like(squares))
    floors = [1e-9 * float(np.diag(c).mean()) + 1e-300 for c in left]
    chosen: list[int] = []
    rest = np.zeros((width + 1, len(found)))
    rest[0] = [float(squares.any()) for squares in weight]
    for m in range(width):
        score = np.zeros(len(left[0]))
        for covariance, squares, floor in zip(left, weight, floors, strict=True):
            own = np.diag(covariance)
            gain = (squares @ np.square(covariance)) / np.maximum(own, floor)
            score += np.where(own > floor, gain, 0.0)
        score[chosen] = -1.0
        best = int(score.argmax())
        chosen.append(best)
        for k, (covariance, floor) in enumerate(zip(left, floors, strict=True)):
            if covariance[best, best] > floor:
                line = covariance[best]
                covariance -= np.outer(line, line / line[best])
            rest[m + 1, k] = weight[k] @ np.maximum(np.diag(covariance), 0.0)
    return chosen, rest
