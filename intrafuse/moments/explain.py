"""Choose channels that explain the inputs of a group's readers; compute what stays unexplained.

This is a pivoted Cholesky decomposition of each reader's covariance Sigma (n, n). Taking channel j
explains Sigma[:, j] Sigma[j, :] / Sigma[j, j]. The weight of channel i is the squared norm of the
reader's weights (outputs, n, taps) for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intrafuse.moments.readers import Reading

__all__ = ["explaining_blocks", "explaining_channels", "unexplained"]


def explaining_channels(found: Sequence[Reading], width: int) -> Tensor:
    """Choose channels greedily: each time the one that explains most of the readers' inputs.

    Args:
        found: reading of each reader; its `old` covariance is used.
        width: m.

    Returns:
        Ascending indices (m,).
    """
    return torch.tensor(sorted(_pivots(found, width)[0]))


def explaining_blocks(found: Sequence[Reading], places: Tensor, width: int) -> Tensor:
    """Choose channels greedily: each time the one whose places together explain most.

    Like `explaining_channels`, for channels with several places in a reading, such as a head and
    its width. A block b of places explains C_:b C_bb^-1 C_b: of the remaining covariance C.

    Args:
        found: reading of each reader, by places; its `old` covariance is used.
        places: (n, r), the places of each channel.
        width: m.

    Returns:
        Ascending indices (m,).
    """
    rows, columns = places[:, :, None], places[:, None, :]
    eye = torch.eye(places.shape[1]).double()
    left = [reading.old.clone() for reading in found]
    powers = []
    for reading in found:
        power = torch.einsum("oit,ojt->ij", reading.taps, reading.taps)
        powers.append(power / (power * reading.old).sum().clamp_min(1e-300))
    floors = [1e-3 * c.diagonal().mean() * eye + 1e-300 * eye for c in left]
    chosen: list[int] = []
    for _ in range(width):
        score = torch.zeros(len(places)).double()
        for c, power, floor in zip(left, powers, floors, strict=True):
            gain = (c @ power @ c)[rows, columns]
            solved = torch.linalg.solve(c[rows, columns] + floor, gain)
            score += solved.diagonal(dim1=1, dim2=2).sum(1)
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
        own = places[chosen[-1]]
        for c, floor in zip(left, floors, strict=True):
            c -= c[:, own] @ torch.linalg.solve(c[own][:, own] + floor, c[own])
    return torch.tensor(sorted(chosen))


def unexplained(found: Sequence[Reading]) -> np.ndarray:
    """Compute the share of each reader's variance that the best m channels leave unexplained.

    Args:
        found: reading of each reader.

    Returns:
        (n + 1, readers), falling from 1 for m = 0 to 0 for m = n.
    """
    return _pivots(found, len(found[0].old_mean))[1]


def _pivots(found: Sequence[Reading], width: int) -> tuple[list[int], np.ndarray]:
    """Return channels in the order chosen, and shares (width + 1, readers) left unexplained."""
    left = [_Unexplained(reading, width) for reading in found]
    chosen: list[int] = []
    rest = np.zeros((width + 1, len(found)))
    rest[0] = [part.share() for part in left]
    for m in range(width):
        score = np.sum([part.score() for part in left], axis=0)
        score[chosen] = -1.0
        chosen.append(int(score.argmax()))
        for part in left:
            part.take(chosen[-1])
        rest[m + 1] = [part.share() for part in left]
    return chosen, rest


class _Unexplained:
    """The covariance of a reader left unexplained by the chosen channels: C - L^T L, (n, n).

    Scores are updated by products with vectors, so C is neither copied nor changed.
    """

    def __init__(self, reading: Reading, width: int) -> None:
        self.covariance = reading.old.numpy()
        self.own = np.diag(self.covariance).copy()
        squares = reading.taps.square().sum((0, 2)).numpy()
        total = float(squares @ self.own)
        self.weight = squares / total if total > 0 else np.zeros_like(squares)
        self.gain = self.weight @ np.square(self.covariance)
        self.floor = 1e-9 * float(self.own.mean()) + 1e-300
        self.rows = np.zeros((width, len(self.own)))  # L
        self.taken = 0

    def share(self) -> float:
        """Return the unexplained share of the weighted variance."""
        return float(self.weight @ np.maximum(self.own, 0.0))

    def score(self) -> np.ndarray:
        """Return the weighted variance (n,) that each channel would explain."""
        alive = self.own > self.floor
        return np.where(alive, self.gain / np.maximum(self.own, self.floor), 0.0)

    def take(self, channel: int) -> None:
        """Add a channel to those that explain."""
        if self.own[channel] <= self.floor:
            return
        before = self.rows[: self.taken]
        line = self.covariance[channel] - before[:, channel] @ before
        line /= np.sqrt(self.own[channel])
        weighted = self.weight * line
        product = self.covariance @ weighted - (before @ weighted) @ before
        self.gain += line * (line * (weighted @ line) - 2 * product)
        self.own -= np.square(line)
        self.rows[self.taken] = line
        self.taken += 1
