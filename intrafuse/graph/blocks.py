"""Read and rewrite the channels of a group along one axis of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intrafuse.graph.axes import Block
from intrafuse.graph.typed import from_numpy

__all__ = ["channel_rows", "merge_channels", "positions", "put_channels", "select_channels"]

SPARSE = 2**16  # entries from which a sparse product is faster
FEW = 32  # of so many entries one may be nonzero then


def positions(blocks: Sequence[Block], channels: int) -> NDArray[np.int64]:
    """List the positions of each channel: an integer array (channels, repeats).

    >>> positions([Block(offset=4, inner=2)], 3).tolist()
    [[4, 5], [6, 7], [8, 9]]
    """
    columns: list[NDArray[np.int64]] = []
    for block in blocks:
        start = np.arange(channels)[:, None] * block.inner + block.offset
        repeats = np.zeros(1, dtype=np.int64)
        for count, stride in block.outer:
            repeats = (repeats[:, None] + np.arange(count) * stride).ravel()
        repeats = (repeats[:, None] + np.arange(block.inner)).ravel()
        columns.append(start + repeats)
    return np.concatenate(columns, axis=1)


def _is_whole_axis(blocks: Sequence[Block], channels: int, length: int) -> bool:
    return len(blocks) == 1 and not blocks[0].outer and channels * blocks[0].inner == length


def channel_rows(tensor: Tensor, axis: int, blocks: Sequence[Block], channels: int) -> Tensor:
    """Gather a group's channels as rows: (channels, product of all other sizes).

    The result is a view if the memory layout allows it.
    """
    front = tensor.movedim(axis, 0)
    if not _is_whole_axis(blocks, channels, tensor.shape[axis]):
        front = front[from_numpy(positions(blocks, channels)).to(tensor.device)]
    return front.reshape(channels, -1)


def select_channels(
    tensor: Tensor, axis: int, blocks: Sequence[Block], channels: int, keep: Tensor
) -> Tensor:
    """Keep some channels of a group (ascending indices) and all positions outside the group."""
    stays = np.ones(tensor.shape[axis], dtype=bool)
    dropped = np.ones(channels, dtype=bool)
    dropped[keep.cpu().numpy()] = False
    stays[positions(blocks, channels)[dropped].ravel()] = False
    return tensor.index_select(axis, from_numpy(np.flatnonzero(stays)).to(tensor.device))


def merge_channels(
    tensor: Tensor, axis: int, blocks: Sequence[Block], channels: int, matrix: Tensor
) -> Tensor:
    """Replace the n channels of a group by m linear combinations of them.

    Args:
        tensor: any parameter.
        axis: the axis on which the channels lie.
        blocks: the places of the channels along the axis.
        channels: n.
        matrix: (m, n); new channel j is the sum over c of matrix[j, c] times channel c. Or
            (r, m, n): one matrix for each of the r places of the channels.

    Returns:
        A new tensor of the same dtype. Products are computed in float32 or better.
    """
    exact = torch.promote_types(tensor.dtype, torch.float32)
    matrix = matrix.to(device=tensor.device, dtype=exact).contiguous()  # strides affect rounding
    front = tensor.movedim(axis, 0)
    pieces: list[Tensor] = []
    reached = 0
    runs = _runs(blocks)
    matrices = matrix.expand(len(runs), *matrix.shape[-2:])
    for (start, inner), own in zip(runs, matrices, strict=True):
        end = start + channels * inner
        rows = front[start:end].reshape(channels, -1).to(exact)
        merged = _product(own, rows).to(tensor.dtype)
        pieces += [front[reached:start], merged.reshape(-1, *front.shape[1:])]
        reached = end
    found = torch.cat([*pieces, front[reached:]])
    # clone, because contiguous() keeps odd strides of axes of size 1, which affect rounding
    return found.movedim(0, axis).clone(memory_format=torch.contiguous_format) if axis else found


def _product(matrix: Tensor, rows: Tensor) -> Tensor:
    """Multiply by a matrix (m, n) of which most entries may be zero, as the means of clusters."""
    if matrix.numel() >= SPARSE and matrix.count_nonzero() * FEW < matrix.numel():
        return matrix.to_sparse() @ rows
    return matrix @ rows


def put_channels(
    line: Tensor, blocks: Sequence[Block], values: Tensor | None, channels: int
) -> None:
    """Write one value per channel, (channels,) or (channels, repeats), into a vector along an axis.

    `values=None` changes nothing.
    """
    if values is not None:
        where = from_numpy(positions(blocks, channels))
        values = values.to(line).reshape(channels, -1)
        line[where] = values.expand(where.shape)


def _runs(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """List the start of each repeat of the channels, and the positions that one channel takes."""
    found = [
        (int(start), block.inner)
        for block in blocks
        for start in positions([Block(block.offset, 1, block.outer)], 1)[0]
    ]
    return sorted(found)
