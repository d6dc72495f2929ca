"""Draw what convolutions and linear maps read and write, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from intrafuse.graph.rules import arguments, operator_name

__all__ = ["drawn", "drawn_lines", "is_plain", "lines", "patches", "without"]

Positions = tuple[Tensor, ...]  # an index for every dimension but that of the channels


def drawn(shape: Sequence[int], most: int) -> Positions:
    """Draw positions at random; the same ones for the same shape, in ascending order.

    Args:
        shape: the dimensions of an activation without that of its channels.
        most: number of positions.
    """
    count = torch.Size(shape).numel()
    chosen = torch.arange(count)
    if count > most:
        generator = torch.Generator().manual_seed(count)
        chosen = torch.randperm(count, generator=generator)[:most].sort().values
    return torch.unravel_index(chosen, tuple(shape)) if len(shape) else ()


def without(shape: Sequence[int], axis: int) -> list[int]:
    """Return the sizes of all dimensions but one."""
    sizes = [*shape]
    del sizes[axis]
    return sizes


def drawn_lines(x: Tensor, axis: int, most: int) -> Tensor:
    """Draw positions, and return their channels along an axis: (samples, channels), float32."""
    return lines(x, axis, drawn(without(x.shape, axis), most))


def lines(x: Tensor, axis: int, positions: Positions) -> Tensor:
    """Return the channels along an axis at some positions: (samples, channels), float32."""
    values = x.movedim(axis, -1)
    return values[tuple(p.to(x.device) for p in positions)].reshape(-1, x.shape[axis]).float()


def patches(node: Node, x: Tensor, taps: Sequence[int], positions: Positions) -> Tensor:
    """Return what a convolution or linear map multiplies by its weight at some output positions.

    Args:
        node: the operator, `conv1d` to `conv3d` or `linear`, in a trace at the shapes of x.
        x: its input.
        taps: the shape of the kernel; empty for a linear map.
        positions: of its output, one index for every dimension but that of the channels.

    Returns:
        (samples, channels, taps), float32, in the order of the weight.
    """
    if not taps:
        return lines(x, -1, positions)[:, :, None]
    stride, dilation, padding = _geometry(arguments(node), taps)
    x = functional.pad(x, [n for ends in reversed(padding) for n in ends])
    values = x.movedim(-1 - len(taps), -1)
    batch, places = positions[: -len(taps)], positions[-len(taps) :]
    parts: list[Tensor] = []
    for tap in product(*map(range, taps)):
        steps = zip(places, stride, tap, dilation, strict=True)
        at = (*batch, *(place * step + own * apart for place, step, own, apart in steps))
        parts.append(values[tuple(p.to(x.device) for p in at)])
    return torch.stack(parts, 2).float()


def _geometry(
    named: dict[str, Any], taps: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Return stride, dilation and padding (before, after) of a convolution, by dimension."""

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else [*value]
        return values * len(taps) if len(values) == 1 else values

    stride, dilation, padding = each(named["stride"]), each(named["dilation"]), named["padding"]
    if padding == "valid":
        return stride, dilation, [(0, 0)] * len(taps)
    if padding == "same":
        whole = [apart * (n - 1) for apart, n in zip(dilation, taps, strict=True)]
        return stride, dilation, [(n // 2, n - n // 2) for n in whole]
    return stride, dilation, [(n, n) for n in each(padding)]


def is_plain(node: Node) -> bool:
    """Tell whether `patches` describes an operator."""
    return operator_name(node) in ("linear", "conv1d", "conv2d", "conv3d")
