"""Record the state of a model and of every object it holds, and restore it afterwards."""

from __future__ import annotations

import enum
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["same_random_state", "unchanged", "walk"]

# Objects of these types are immutable, or do not belong to the model.
LEAVES = (
    *(str, bytes, int, float, complex, type(None), type, enum.Enum, torch.dtype, torch.device),
    *(types.FunctionType, types.BuiltinFunctionType, torch.layout),
)
PLAIN = (types.SimpleNamespace, partial)  # types of the standard library to descend into


@contextmanager
def unchanged(model: nn.Module, *, values: bool = True) -> Iterator[None]:
    """Let a model's code run, then restore everything that it changed, also after an error.

    Modules, containers and plain objects get their former contents back: the same objects in the
    same order. Nothing is replaced by a copy, so outside references stay valid.

    Args:
        model: the module.
        values: also restore the numbers in tensors that are not parameters. `torch.export` computes
            only with shapes, so it changes no numbers.
    """
    kept = _Kept(model, values)
    try:
        yield
    finally:
        kept.restore()


@contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """Let code draw random numbers, then restore the global generators."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])


def walk(model: nn.Module) -> Iterator[Any]:
    """Iterate once over every object in a model's modules, containers and plain objects."""
    known: dict[int, Any] = {}  # keeps visited objects alive, so that no id is reused
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, LEAVES) and id(value) not in known:
            known[id(value)] = value
            yield value
            waiting += _parts(value)


def _parts(value: Any) -> list[Any]:
    """List the parts of an object; locks, files and functions have none."""
    if isinstance(value, types.MethodType):
        return [value.__self__]
    found: list[Any] = []
    if isinstance(value, dict):
        found += [part for item in _items(value) for part in item]
    elif isinstance(value, list | deque | set | tuple | frozenset):
        found += value
    if _open(value):
        found += [held for _, held in _slots(value)]
        found.append(getattr(value, "__dict__", None))
    return found


def _open(value: Any) -> bool:
    home = type(value).__module__.partition(".")[0]  # "builtins" for Python modules
    return home not in sys.stdlib_module_names or isinstance(value, PLAIN)


def _items(value: dict) -> list[tuple[Any, Any]]:
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    return [*kind.items(value)]  # ignores a subclass's own `items`


def _slots(value: Any) -> list[tuple[types.MemberDescriptorType, Any]]:
    """List the slots, with their values, of an object whose class has `__slots__`."""
    own = (vars(cls).values() for cls in type(value).__mro__ if "__slots__" in vars(cls))
    named = (s for slots in own for s in slots if isinstance(s, types.MemberDescriptorType))
    return [(s, getattr(value, s.__name__)) for s in named if hasattr(value, s.__name__)]


class _Kept:
    """Functions that undo changes to each part of a model."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        self.values = values
        self.undo: list[Callable[[], object]] = []
        for value in [*walk(model)]:
            self._keep(value)

    def restore(self) -> None:
        for undo in self.undo:
            undo()

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, np.ndarray):
            self.undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, dict):
            self.undo.append(partial(_refill, value, _items(value)))
        elif isinstance(value, list | deque | set):
            self.undo.append(partial(_refill, value, list(value)))
        elif isinstance(value, nn.Module):
            self.undo.append(partial(_same_class, value, type(value)))
            if self.values and getattr(value, "max_norm", None) is not None:
                for weight in value.parameters(recurse=False):  # an embedding rescales rows
                    self._keep_numbers(weight)
        elif _open(value):
            self.undo += [partial(_same_slot, value, *slot) for slot in _slots(value)]

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_leaf:
            self.undo.append(partial(_same_leaf, tensor, tensor.requires_grad, tensor.grad))
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            self.undo.append(partial(_same_storage, tensor, tensor.detach()))
            if self.values and not isinstance(tensor, nn.Parameter):
                self._keep_numbers(tensor)

    def _keep_numbers(self, tensor: Tensor) -> None:
        if tensor.device.type != "meta" and not tensor.is_quantized:
            self.undo.append(partial(_same_numbers, tensor, tensor.detach().clone()))


def _refill(value: Any, items: list[Any]) -> None:
    """Restore a container's items unless it holds the same objects in the same order."""
    kinds = (OrderedDict, dict, list, deque, set)
    kind: Any = next(kind for kind in kinds if isinstance(value, kind))
    now = _items(value) if isinstance(value, dict) else [*value]
    if isinstance(value, dict):
        same = [x is y for a, b in zip(now, items, strict=False) for x, y in zip(a, b, strict=True)]
    else:
        same = [x is y for x, y in zip(now, items, strict=False)]
    if len(now) != len(items) or not all(same):
        kind.clear(value)
        refill: Any = kind.extend if kind in (list, deque) else kind.update
        refill(value, items)


def _same_class(value: Any, kind: type) -> None:
    if type(value) is not kind:
        value.__class__ = kind


def _same_slot(value: Any, slot: types.MemberDescriptorType, held: Any) -> None:
    if getattr(value, slot.__name__, None) is not held:
        slot.__set__(value, held)


def _same_leaf(tensor: Tensor, trained: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != trained:
        tensor.requires_grad_(trained)
    if tensor.grad is not grad:
        tensor.grad = grad


def _same_storage(tensor: Tensor, alias: Tensor) -> None:
    """Undo `tensor.data = other`."""
    places = [(t.shape, t.stride(), t.untyped_storage()._cdata) for t in (tensor, alias)]
    if places[0] != places[1]:
        tensor.data = alias


def _same_numbers(tensor: Tensor, numbers: Tensor) -> None:
    if not torch.equal(
        *(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, numbers))
    ):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(numbers)
