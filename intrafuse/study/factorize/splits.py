"""Split the positions of the training images into parts, by scheme and seed."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intrafuse.study.factorize.recipe import Splits
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing
from intrafuse.support.reading import read_text, require_file

__all__ = ["read_positions", "split", "write_positions"]


def split(splits: Splits, labels: Tensor, *, seed: int = 0) -> list[Tensor]:
    """Choose the images of each part.

    Args:
        splits: settings of the split.
        labels: labels of all training images, int64, (N,).
        seed: seed of all random choices.

    Returns:
        For each part the positions of its images: int64, ascending, without repetition.

    Raises:
        IntrafuseError: a part would hold no images, or a file names images that do not exist.

    >>> [len(part) for part in split(Splits(folds=2), torch.zeros(5, dtype=torch.int64))]
    [3, 2]
    """
    random = np.random.default_rng(seed)
    if splits.folds > len(labels):
        raise IntrafuseError(
            f"{len(labels)} images cannot fill more folds: a part of the data would hold no images",
            value=splits.folds,
            remedy="fewer folds",
        )
    if splits.scheme == "files":
        parts = [read_positions(Path(file)) for file in splits.files]
    elif splits.scheme == "dirichlet":
        parts = _dirichlet(splits, labels.numpy(), random)
    else:
        subsets = np.array_split(random.permutation(len(labels)), splits.folds)
        parts = list(subsets)
        if splits.scheme == "k-fold":
            chosen = combinations(range(splits.folds), splits.folds // 2)
            parts = [np.concatenate([subsets[i] for i in some]) for some in chosen]
        elif splits.scheme == "overlapping":
            parts = [_widened(part, len(labels), splits.overlap, random) for part in subsets]
    return [_checked(part, len(labels), i + 1) for i, part in enumerate(parts)]


def _widened(part: np.ndarray, total: int, overlap: float, random: np.random.Generator):
    """Add images of other parts, up to the share `overlap`."""
    others = np.setdiff1d(np.arange(total), part)
    extra = min(len(others), round(len(part) * overlap / (1 - overlap)))
    return np.concatenate([part, random.choice(others, extra, replace=False)])


def _dirichlet(splits: Splits, labels: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Distribute each class by proportions from a Dirichlet distribution."""
    parts: list[list[np.ndarray]] = [[] for _ in range(splits.folds)]
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(splits.folds, splits.alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _checked(part: np.ndarray, total: int, number: int) -> Tensor:
    positions = np.unique(part.astype(np.int64))
    if not len(positions):
        raise IntrafuseError(
            "a part of the data holds no images",
            layer=f"part {number}",
            remedy="fewer folds, a larger alpha, or another seed",
        )
    if len(positions) != len(part) or positions[0] < 0 or positions[-1] >= total:
        raise IntrafuseError(
            f"positions must be different whole numbers in 0..{total - 1}", layer=f"part {number}"
        )
    return torch.from_numpy(positions)


def read_positions(path: Path) -> np.ndarray:
    """Read positions of images: an .npy file of whole numbers, or text with one number per line.

    Raises:
        IntrafuseError: the file is missing, broken, or holds other data.
    """
    try:
        require_file(path)
        if path.suffix == ".npy":  # mapped: takes no more memory than the file size
            positions = np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            positions = np.array([int(line) for line in read_text(path).split()], np.int64)
    except (OSError, ValueError, EOFError, OverflowError, TypeError, SyntaxError) as error:
        text = " ".join(str(error).split())
        raise IntrafuseError(f"positions cannot be read: {text}", value=str(path)) from error
    if positions.ndim != 1 or not np.issubdtype(positions.dtype, np.integer):
        raise IntrafuseError("positions must be a list of whole numbers", value=str(path))
    return positions


def write_positions(positions: Tensor, path: Path) -> None:
    """Write positions as an .npy file."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, positions.numpy(), allow_pickle=False)
