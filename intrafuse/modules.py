"""Copy a module without its tensors, and set tensors and attributes by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from intrafuse.errors import IntrafuseError

__all__ = ["copy_without", "place"]


def copy_without(model: nn.Module, replaced: list[Tensor]) -> nn.Module:
    """Copy a module but for tensors that will be replaced, which would double its memory."""
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in replaced})
    except RuntimeError as error:  # a module that keeps an activation, old weight norm
        raise IntrafuseError(
            f"the model cannot be copied: {str(error).splitlines()[0]}",
            remedy="call the model under torch.no_grad() first, and remove hooks such as "
            "weight_norm",
        ) from error


def place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Mapping[str, int]],
    remove: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Set tensors and attributes of a module by name, whatever shapes it had before."""
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
                if isinstance(owner, nn.RNNBase):  # it keeps a list of its weights
                    setattr(owner, leaf, parameter)
                else:
                    owner._parameters[leaf] = parameter
            else:
                raise IntrafuseError("the module has no such parameter", layer=path)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants the weights in one piece of memory
    for path, values in attributes.items():
        for attribute, value in values.items():
            owner = model.get_submodule(path)
            whole = isinstance(getattr(owner, attribute, None), tuple)  # normalized_shape
            setattr(owner, attribute, (value,) if whole else value)
    for path in remove:
        owner, leaf = _owner(model, path)
        setattr(owner, leaf, nn.Identity())


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
    """Lay out a convolution's weight as the old one was: channels first or channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.dim())
    if old is None or last is None or old.dim() != new.dim() or old.is_contiguous():
        return new
    return new.contiguous(memory_format=last) if old.is_contiguous(memory_format=last) else new


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
