"""Labeled images in normalized batches, held as one tensor or as files read on demand.

This file also holds the small functions that the loaders share. Pillow and pyarrow come with the
extra ``data``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra

__all__ = ["RGB_MEAN", "RGB_STD", "ImageFiles", "Images", "decode", "open_folder"]

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
FORMATS = ("PNG", "JPEG")  # accepted by content, not by suffix: decoding EPS would start a program


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded only when indexed, so that a folder need not fit in memory.

    Args:
        paths: one file for each image.
        size: height and width in pixels. The shorter side is resized to it, the center is cropped.

    >>> ImageFiles((Path("a.png"), Path("b.png")), size=64).shape
    (2, 3, 64, 64)
    """

    paths: tuple[Path, ...]
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (images, 3, size, size) of the decoded tensor."""
        return len(self.paths), 3, self.size, self.size

    def subset(self, index: Tensor) -> ImageFiles:
        """Keep the files at these positions (int64, (n,)) without decoding them."""
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()))

    def __getitem__(self, index: Tensor) -> Tensor:
        """Decode the images at these positions (int64, (n,)) to uint8, (n, 3, size, size)."""
        ops = import_extra("PIL.ImageOps", "data")
        bilinear = import_extra("PIL.Image", "data").Resampling.BILINEAR
        pixels = np.empty((len(index), self.size, self.size, 3), np.uint8)
        for row, i in enumerate(index.tolist()):
            path = self.paths[i]
            image = decode(path, where=str(path))
            pixels[row] = ops.fit(image, (self.size, self.size), method=bilinear)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """Labeled images that are returned in normalized batches.

    Args:
        images: uint8 pixels in 0..255, (N, C, H, W): a tensor, or files that are read on demand.
        labels: int64, (N,), each in 0..len(classes) - 1.
        classes: the name of each class.
        mean, std: one number for each channel, after division of the pixels by 255.
            For another normalization use ``dataclasses.replace(data, mean=..., std=...)``.
        name: the SPEC that the images came from.

    Raises:
        IntrafuseError: there are no images, or the fields are inconsistent.

    >>> from intrafuse.catalog.data import load_data
    >>> data = load_data("digits", limit=100)
    >>> len(data), data.input_shape, data.classes[3]
    (100, (1, 8, 8), '3')
    >>> [tuple(images.shape) for images, labels in data.batches(64)]
    [(64, 1, 8, 8), (36, 1, 8, 8)]
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        shape, n = tuple(self.images.shape), len(self.labels)
        if len(shape) != 4 or shape[0] != n:
            raise IntrafuseError(
                "images must have the shape (N, C, H, W) with one label each",
                value=(shape, n),
                layer=self.name,
            )
        if isinstance(self.images, Tensor) and self.images.dtype != torch.uint8:
            raise IntrafuseError("images must be uint8", value=self.images.dtype, layer=self.name)
        if not n:
            raise IntrafuseError(
                "the data set holds no images",
                layer=self.name,
                remedy="try another folder or split",
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise IntrafuseError(
                f"labels must lie in 0..{len(self.classes) - 1}",
                value=low if low < 0 else high,
                layer=self.name,
            )
        if not (len(self.mean) == len(self.std) == shape[1]) or min(self.std) <= 0:
            raise IntrafuseError(
                f"mean and std need {shape[1]} numbers each, and std positive ones",
                value=(self.mean, self.std),
                layer=self.name,
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def batches(
        self,
        batch_size: int = 256,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalized float32 images (B, C, H, W), int64 labels (B,)), each image once.

        Args:
            batch_size: images in a batch; the last batch may be smaller.
            shuffle: True for a random order, which depends only on the seed.
            seed: seed of the order; use a different seed in each epoch.
            device: device of the batches; pixels are copied as uint8 and normalized there.

        Raises:
            IntrafuseError: batch_size is below 1, or a file cannot be decoded.
        """
        if batch_size < 1:
            raise IntrafuseError("batch_size must be at least 1", value=batch_size)
        order = self._shuffled(seed) if shuffle else torch.arange(len(self))
        return (
            (self._normalised(part, device), self.labels[part].to(device))
            for part in order.split(batch_size)
        )

    def take(self, n: int) -> Images:
        """Keep the first n images, or all if there are fewer.

        Raises:
            IntrafuseError: n is below 1.

        >>> from intrafuse.catalog.data import load_data
        >>> len(load_data("digits").take(10))
        10
        """
        if n < 1:
            raise IntrafuseError("the number of images must be at least 1", value=n)
        return self.subset(torch.arange(min(n, len(self))))

    def unlabelled(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw n random images without replacement, or all if there are fewer, for calibration.

        Returns:
            Normalized float32 images (n, C, H, W) on the CPU.

        Raises:
            IntrafuseError: n is below 1.

        >>> from intrafuse.catalog.data import load_data
        >>> tuple(load_data("digits").unlabelled(32).shape)
        (32, 1, 8, 8)
        """
        if n < 1:
            raise IntrafuseError("the number of images must be at least 1", value=n)
        return self._normalised(self._shuffled(seed)[:n], "cpu")

    def subset(self, index: Tensor) -> Images:
        """Keep the images at these positions (int64, (n,)), in this order."""
        images = self.images
        images = images.subset(index) if isinstance(images, ImageFiles) else images[index]
        return replace(self, images=images, labels=self.labels[index])

    def digest(self) -> str:
        """Hash the name, the labels in order, the normalization and the shape of the images."""
        told = f"{self.name} {self.mean} {self.std} {tuple(self.images.shape)}".encode()
        return hashlib.sha256(told + self.labels.numpy().tobytes()).hexdigest()

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _normalised(self, index: Tensor, device: str | torch.device) -> Tensor:
        pixels = self.images[index].to(device).float().div_(255)
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)


def decode(source: Path | io.BytesIO, *, where: str) -> Any:
    """Decode one image to a Pillow image in RGB.

    Args:
        source: an image file, or its bytes.
        where: names the image in error messages.

    Raises:
        IntrafuseError: the image cannot be decoded.
    """
    library = import_extra("PIL.Image", "data")
    try:
        with library.open(source, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise IntrafuseError(
            f"the image cannot be decoded ({error})", value=where, remedy="replace or remove it"
        ) from error


def open_folder(argument: str, *, example: str) -> Path:
    """Return the folder part of a SPEC as a path, with ~ expanded.

    Raises:
        IntrafuseError: `argument` is empty or not a folder; the message shows `example`.

    >>> open_folder(".", example="cifar10:FOLDER").is_dir()
    True
    """
    if not argument:
        raise IntrafuseError(
            "the data set needs a folder", remedy=f"write the SPEC as {example}", usage=True
        )
    try:
        folder = Path(argument).expanduser()
    except RuntimeError as error:  # ~ of a user who does not exist
        raise IntrafuseError(
            f"the folder does not exist ({error})", value=argument, remedy=f"write {example}"
        ) from error
    if not folder.is_dir():
        raise IntrafuseError(
            "the folder does not exist", value=argument, remedy=f"write the SPEC as {example}"
        )
    return folder
