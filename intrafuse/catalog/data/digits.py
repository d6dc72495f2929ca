"""scikit-learn's handwritten digits: 1,797 gray images of 8 x 8, without a download."""

from __future__ import annotations

import numpy as np
import torch

from intrafuse.catalog.data.images import Images
from intrafuse.support.errors import IntrafuseError

__all__ = ["load"]


def load(argument: str, split: str, limit: int | None) -> Images:
    """Load the digits. In each class, every fourth image is a test image.

    Args:
        argument: must be empty.
        split: "train" (1,352 images) or "test" (445).
        limit: number of images to keep; None keeps all.

    Raises:
        IntrafuseError: `argument` is not empty.
    """
    from sklearn.datasets import load_digits  # slow to import

    if argument:
        raise IntrafuseError("digits takes no folder", value=argument, usage=True)
    images, labels = load_digits(return_X_y=True)
    rank = np.empty(len(labels), np.int64)  # index of an image within its class
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    chosen = np.flatnonzero((rank % 4 == 3) == (split == "test"))[:limit]
    pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Images(
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels[chosen].astype(np.int64)),
        classes=tuple("0123456789"),
        mean=(0.3049,),
        std=(0.3756,),
        name="digits",
    )
