"""Pack tensors into the file of a saved network, and unpack them bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafuse.checkpoint.manifest import Stored
from intrafuse.surgery.handles import Held

__all__ = ["agrees", "dtype_name", "memory_order", "pack", "unpack"]


def dtype_name(tensor: Held) -> str:
    """Return the name of a tensor's dtype in the manifest, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the order of axes in memory, because kernels, and thus rounding, depend on it.

    None if the tensor is contiguous, or not dense.
    """
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None


def pack(tensor: Tensor, stored: Stored) -> Tensor:
    """Copy a tensor into contiguous memory, as safetensors requires."""
    tensor = tensor.resolve_conj().resolve_neg()
    if stored.dtype in ("complex32", "complex128"):
        tensor = torch.view_as_real(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def unpack(tensor: Tensor, stored: Stored) -> Tensor:
    """Restore a packed tensor, with its order in memory."""
    tensor = tensor.clone()  # detached from the file, and aligned like any other tensor
    pairs = {"complex32": torch.float16, "complex128": torch.float64}
    if pairs.get(stored.dtype) == tensor.dtype and tensor.shape[-1:] == (2,):
        tensor = torch.view_as_complex(tensor)
    order = stored.order
    if order is not None and sorted(order) == list(range(tensor.dim())):
        back = sorted(range(len(order)), key=order.__getitem__)
        tensor = tensor.permute(order).contiguous().permute(back)
    return tensor


def agrees(tensor: Tensor, stored: Stored) -> bool:
    """Tell whether a tensor has the shape and dtype in the manifest."""
    return tuple(tensor.shape) == stored.shape and dtype_name(tensor) == stored.dtype
