"""Handles: tensors that stay in files, and are read each time they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from intrafuse.graph.groups import ChannelGraph
from intrafuse.support.device import require_numbers
from intrafuse.support.errors import IntrafuseError

__all__ = ["Checked", "Handle", "Held", "Loading", "require_finite", "require_fit"]


class Handle(Protocol):
    """A tensor that is stored elsewhere, such as in a file. It never keeps what it loads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        ...

    def numel(self) -> int:
        """Return the number of its elements."""
        ...

    def load(self) -> Tensor:
        """Read the tensor."""
        ...


Held = Tensor | Handle


class Loading(Mapping[str, Tensor]):
    """A read-only view of tensors and handles, which loads a handle when it is asked for.

    Names, `in` and `len` load nothing. `values` and `items` load one tensor after the other.

    >>> view = Loading({"a": torch.ones(1)})
    >>> view["a"], [*view]
    (tensor([1.]), ['a'])
    """

    def __init__(self, held: Mapping[str, Held]) -> None:
        self._held = held

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        return held if isinstance(held, Tensor) else held.load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held


class Checked:
    """A handle whose numbers are checked when they are first loaded.

    Args:
        handle: the tensor.
        name: its name, for the error.
        infinite: whether it may hold infinity, as attention masks do.
    """

    def __init__(self, handle: Handle, name: str, infinite: bool) -> None:
        self._handle, self._name, self._infinite = handle, name, infinite
        self._is_checked = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""
        return self._handle.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self._handle.dtype

    def numel(self) -> int:
        """Return the number of its elements."""
        return self._handle.numel()

    def load(self) -> Tensor:
        """Read the tensor.

        Raises:
            IntrafuseError: it is not finite.
        """
        tensor = self._handle.load()
        if not self._is_checked:
            require_finite(self._name, tensor, infinite=self._infinite)
            self._is_checked = True
        return tensor


def require_finite(name: str, tensor: Tensor, *, infinite: bool) -> None:
    """Refuse NaN, and infinity unless `infinite`.

    Raises:
        IntrafuseError: the tensor is not finite.
    """
    if not tensor.is_floating_point():
        return
    if bool((tensor.isnan() if infinite else ~torch.isfinite(tensor)).any()):
        raise IntrafuseError(
            "weights must be finite, but NaN or infinity was found",
            layer=name,
            remedy="repair or reload the weights",
        )


def require_fit(graph: ChannelGraph, name: str, tensor: Held, merged: bool) -> None:
    """Refuse a tensor whose shape is not the graph's, or whose numbers cannot be computed with.

    Raises:
        IntrafuseError: the tensor has another shape, holds no numbers, or has fewer than 16 bits
            while its channels are `merged`.
    """
    if tuple(tensor.shape) != graph.shape(name, graph.sizes):
        raise IntrafuseError(
            "the model must have the shapes that the plan was made for",
            value=tuple(tensor.shape),
            layer=name,
            remedy="make the plan from this model",
        )
    if isinstance(tensor, Tensor):
        require_numbers(name, tensor)
    if merged and tensor.dtype.is_floating_point and tensor.dtype.itemsize < 2:
        raise IntrafuseError(
            "weights must have 16 bits or more",
            value=str(tensor.dtype),
            layer=name,
            remedy="prune model.to(torch.bfloat16), and quantize the result",
        )
