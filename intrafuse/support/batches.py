"""Read the user's data batch by batch, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from intrafuse.support.calls import as_called
from intrafuse.support.errors import IntrafuseError

__all__ = [
    "batches",
    "fitting",
    "map_tensors",
    "require_finite",
    "require_rereadable",
    "tensors_of",
]

ADVICE = "give data=, batches of inputs or of (inputs, labels), or --data SPEC"


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change every tensor in a tree: what PyTorch's `_pytree` opens, and what it does not.

    The latter are mappings and sequences of other types, such as the batches of transformers, and
    dataclasses that are not registered.
    """

    def at(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Mapping):
            return {name: map_tensors(change, item) for name, item in leaf.items()}
        if isinstance(leaf, tuple | list):
            return type(leaf)(map_tensors(change, [*leaf]))
        if is_dataclass(leaf) and not isinstance(leaf, type):
            names = [field.name for field in fields(leaf) if field.init]
            return replace(leaf, **{n: map_tensors(change, getattr(leaf, n)) for n in names})
        return leaf

    return tree_map(at, value)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a tree, of which `map_tensors` says what it may be."""
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_of([*leaf.values()])
        elif isinstance(leaf, tuple | list):
            yield from tensors_of([*leaf])
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, field.name) for field in fields(leaf)])


def batches(
    data: Any, model: nn.Module, *, purpose: str, limit: int | None = None, instead: str = ""
) -> Iterator[tuple[Any, Any]]:
    """Iterate over (inputs, labels or None) on the model's device.

    Args:
        data: batches of inputs or of (inputs, labels). Inputs are a tensor, a tuple of args or a
            mapping of kwargs.
        model: the model that reads the inputs.
        purpose: the step that needs the data; error messages name it.
        limit: the most batches to read; None for all.
        instead: an alternative that needs no data; the error for missing data names it.

    Raises:
        IntrafuseError: `data` is None, is not made of batches, is empty, or holds numbers that
            are not finite.

    >>> [x.shape for x, _ in batches([torch.zeros(2, 3)], nn.Linear(3, 1), purpose="repair")]
    [torch.Size([2, 3])]
    """
    if data is None:
        raise IntrafuseError(f"{purpose} needs data", remedy=ADVICE + instead, usage=True)
    _require_iterable(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for batch in islice(data, limit):
        labels = None
        if isinstance(batch, tuple | list):
            if len(batch) not in (1, 2):
                raise IntrafuseError(
                    "a batch must be inputs or (inputs, labels)",
                    value=f"{len(batch)} parts",
                    remedy="put several inputs of one batch into a tuple or a mapping of kwargs",
                )
            batch, labels = (*batch, None)[:2]
        count += 1
        require_finite((batch, labels), f"batch {count} of the data")
        yield map_tensors(lambda t: t.to(device), (batch, labels))
    if not count:
        raise IntrafuseError(
            "data gave no batch",
            remedy="give a list or a loader, which can be read more than once, not an iterator",
        )


def require_finite(value: Any, what: str) -> None:
    """Refuse NaN and +infinity in nested tensors. Attention masks may hold -infinity.

    Raises:
        IntrafuseError: names `what` and says whether it holds NaN or infinity.
    """
    for tensor in tensors_of(value):
        if tensor.is_floating_point() and not bool((tensor < torch.inf).all()):
            number = "nan" if bool(tensor.isnan().any()) else "inf"
            raise IntrafuseError(
                f"data must be finite, but {what} is not",
                value=number,
                remedy="remove or repair these samples",
            )


def require_rereadable(data: object) -> None:
    """Refuse data that can be read only once. None, which stands for no data, is allowed.

    Raises:
        IntrafuseError: `data` is an iterator, or is not made of batches.
    """
    if data is not None:
        _require_iterable(data)
    if isinstance(data, Iterator):
        raise IntrafuseError(
            "data must be readable more than once: a list of batches or a loader",
            value=type(data).__name__,
            remedy="list(batches)",
        )


def _require_iterable(data: object) -> None:
    if isinstance(data, Tensor | Mapping | str) or not hasattr(data, "__iter__"):
        kind = type(data).__name__
        raise IntrafuseError("data must be an iterable of batches", value=kind, remedy=ADVICE)


@contextmanager
def fitting(what: str, remedy: str) -> Iterator[None]:
    """Turn an error that the model raises for unfit inputs into a one-line IntrafuseError.

    Args:
        what: names the inputs in the error.
        remedy: tells the user how to fix it.
    """
    try:
        with as_called():
            yield
    except (IntrafuseError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntrafuseError(f"the model refused {what}: {text}", remedy=remedy) from error
