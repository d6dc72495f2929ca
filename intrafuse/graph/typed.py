"""Typed access to functions that PyTorch leaves without types, and to values without a type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["from_numpy", "integers", "is_several", "length", "named_modules", "sorted_values"]


def is_several(value: object) -> TypeGuard[Sequence[Any]]:
    """Tell whether a value is a tuple or a list, as the result of several tensors is."""
    return isinstance(value, tuple | list)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the modules of a model with their paths, each once."""
    return model.named_modules()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def from_numpy(array: NDArray[Any]) -> Tensor:
    """Return a tensor that shares the memory of an array."""
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def integers(tensor: Tensor) -> list[int]:
    """List the numbers of a vector of integers."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def length(tensor: Tensor, dim: int) -> Tensor:
    """Compute the Euclidean norm along a dimension."""
    return tensor.norm(dim=dim)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def sorted_values(tensor: Tensor) -> Tensor:
    """List the different numbers of a tensor, in ascending order."""
    return tensor.unique()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
