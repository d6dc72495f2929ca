"""Random shifts and mirror images for a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_flip"]


def crop_flip(images: Tensor, generator: torch.Generator, *, most: int = 4) -> Tensor:
    """Shift every image by up to `most` pixels in each direction, and mirror it with chance 1/2.

    Args:
        images: normalized, (B, C, H, W). New pixels at the border are 0, the mean.
        generator: random number generator on the CPU.
        most: the largest shift in pixels.

    Returns:
        A new tensor of the same shape.

    >>> crop_flip(torch.ones(2, 3, 8, 8), torch.Generator(), most=0).unique()
    tensor([1.])
    """
    count, _, height, width = images.shape
    down, right = torch.randint(2 * most + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + right
    rows = torch.arange(height) + down
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)
    place = images.device
    index = torch.arange(count, device=place)[:, None, None]
    shifted = padded[index, rows[:, :, None].to(place), columns[:, None, :].to(place)]
    return shifted.permute(0, 3, 1, 2)
