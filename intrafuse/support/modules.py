"""Copy a module without its tensors, and set tensors and sizes by name."""

from __future__ import annotations

import copy
import io
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.snapshot import walk

__all__ = ["copy_without", "held_size", "held_sizes", "place", "set_size"]

# Objects that a model and its copy may share.
SHARED = (type(threading.Lock()), type(threading.RLock()), io.IOBase, types.ModuleType)


def copy_without(model: nn.Module, replaced: Sequence[Tensor]) -> nn.Module:
    """Deep-copy a module, sharing tensors that will be replaced, so that memory does not double.

    The copy also shares locks, open files and Python modules with the original.

    Raises:
        IntrafuseError: an attribute of the model cannot be copied; the message names it.
    """
    shared: list[Any] = [*replaced, *(held for held in walk(model) if isinstance(held, SHARED))]
    known = {id(held): held for held in shared}
    try:
        return copy.deepcopy(model, dict(known))
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        kept = isinstance(error, RuntimeError)  # an activation, or the weight of old weight norm
        raise IntrafuseError(
            f"the model cannot be copied: {text}",
            layer=_uncopyable(model, known),
            remedy="call the model under torch.no_grad() first, and remove hooks such as "
            "weight_norm"
            if kept
            else "set it to None, or give it a __deepcopy__",
        ) from error


def _uncopyable(model: nn.Module, known: Mapping[int, object]) -> str | None:
    """Name the attribute that cannot be copied; submodules themselves are skipped."""
    own = {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            memo = {**own, **known, id(module._modules): module._modules}
            try:
                copy.deepcopy(value, memo)
            except (Exception, SystemExit):
                return f"{path}.{name}".removeprefix(".")
    return None


def place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Mapping[str, int]],
    remove: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Set tensors and attributes of a module by name; new shapes may differ from old ones."""
    names: dict[str, list[str]] = {}
    for other, name in (aliases or {}).items():
        names.setdefault(name, []).append(other)
    for name, tensor in tensors.items():
        parameter = None
        for path in (name, *names.get(name, ())):
            owner, leaf = _owner(model, path)
            old = getattr(owner, leaf)
            if leaf in owner._buffers:
                owner._buffers[leaf] = tensor
            elif leaf in owner._parameters:
                trained = old.requires_grad if old is not None else _trains(owner)
                if parameter is None:
                    parameter = nn.Parameter(_in_layout_of(old, tensor), requires_grad=trained)
                if isinstance(owner, nn.RNNBase):  # RNNBase keeps a list of its weights
                    setattr(owner, leaf, parameter)
                else:
                    owner._parameters[leaf] = parameter
            else:
                raise IntrafuseError("the module has no such parameter", layer=path)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN needs contiguous weights
    for path, values in attributes.items():
        for attribute, value in values.items():
            set_size(model.get_submodule(path), attribute, value)
    for path in remove:
        owner, leaf = _owner(model, path)
        setattr(owner, leaf, nn.Identity())


def held_sizes(module: nn.Module) -> Iterator[tuple[str, int, object]]:
    """List the integers that a module holds: (name, number, object that holds the number).

    Numbers inside lists, dictionaries and plain objects, such as a configuration, have dotted
    names: `sizes.0`, `config.num_heads`.
    """
    for name, value in vars(module).items():
        if type(value) is int:
            yield name, value, module
    for name, value in vars(module).items():
        if not name.startswith("_"):
            inside = ((str(key), item) for key, item in _items(value) if type(item) is int)
            yield from ((f"{name}.{key}", item, value) for key, item in inside)


def held_size(module: nn.Module, name: str) -> int | None:
    """Return the integer that a module holds under a name of `held_sizes`, or None."""
    if "." in name:
        return next((value for known, value, _ in held_sizes(module) if known == name), None)
    value = getattr(module, name, None)
    return value if isinstance(value, int) else None


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, list | tuple):
        return enumerate(value)
    if isinstance(value, dict):
        return value.items()
    plain = not isinstance(value, nn.Module | Tensor | type) and hasattr(value, "__dict__")
    return vars(value).items() if plain else ()


def set_size(module: nn.Module, name: str, value: int) -> None:
    """Set the integer that a module holds under a name of `held_sizes`."""
    first, _, rest = name.partition(".")
    held = getattr(module, first) if rest else None
    if isinstance(held, tuple):
        parts = [value if str(i) == rest else part for i, part in enumerate(held)]
        setattr(module, first, held._make(parts) if hasattr(held, "_make") else tuple(parts))  # type: ignore[attr-defined]
    elif isinstance(held, list):
        held[int(rest)] = value
    elif isinstance(held, dict):
        held[next(key for key in held if str(key) == rest)] = value
    else:
        setattr(held if rest else module, rest or name, value)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    try:
        owner = model.get_submodule(module)
    except AttributeError as error:
        raise IntrafuseError("the module has no such layer", layer=module) from error
    if not hasattr(owner, leaf):
        raise IntrafuseError("the module has no such parameter", layer=path)
    return owner, leaf


def _in_layout_of(old: Tensor | None, new: Tensor) -> Tensor:
    """Give a new convolution weight the memory format (channels first or last) of the old."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.dim())
    if old is None or last is None or old.dim() != new.dim() or old.is_contiguous():
        return new
    return new.contiguous(memory_format=last) if old.is_contiguous(memory_format=last) else new


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
