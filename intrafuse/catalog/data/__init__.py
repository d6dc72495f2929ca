"""Image data sets: the loader of each SPEC string. All loaders return `Images`.

To add a data set, write ``(argument, split, limit) -> Images`` and enter it in DATASETS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from intrafuse.catalog.data import cifar, digits, imagefolder
from intrafuse.catalog.data.images import ImageFiles, Images
from intrafuse.support.errors import IntrafuseError

__all__ = ["DATASETS", "ImageFiles", "Images", "load_data"]


def _hub(argument: str, split: str, limit: int | None) -> Images:
    raise IntrafuseError(
        "hf data sets are not supported yet",
        value=f"hf:{argument}",
        remedy="export the images to FOLDER/{train,test}/CLASS and use imagefolder:FOLDER",
    )


DATASETS: dict[str, Callable[[str, str, int | None], Images]] = {
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "imagefolder": imagefolder.load,
    "hf": _hub,
}


def load_data(spec: str, *, split: str = "test", limit: int | None = None) -> Images:
    """Load the data set that a SPEC names.

    Args:
        spec: `digits`, `cifar10:FOLDER`, `cifar100:FOLDER` or `imagefolder:FOLDER` (224 pixels),
            `imagefolder:FOLDER@64` (64 pixels).
        split: "train" or "test".
        limit: number of images to keep from the start; None keeps all.

    Raises:
        IntrafuseError: unknown spec or split, limit below 1, missing folder, file or column,
            an image that cannot be decoded, no images, or an extra that is not installed.

    >>> len(load_data("digits", split="train")), len(load_data("digits"))
    (1352, 445)
    """
    if split not in ("train", "test"):
        raise IntrafuseError('split must be "train" or "test"', value=split, usage=True)
    if limit is not None and limit < 1:
        raise IntrafuseError("limit must be at least 1", value=limit, usage=True)
    name, _, argument = spec.partition(":")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        raise IntrafuseError(
            "unknown data set", value=spec, remedy=f"try {' or '.join(near)}", usage=True
        )
    return DATASETS[name](argument, split, limit)
