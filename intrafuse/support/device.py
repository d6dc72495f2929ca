"""Choose a device, and refuse an unusable one before anything is computed on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intrafuse.support.errors import IntrafuseError

__all__ = ["pick_device", "require_device", "require_numbers"]


def pick_device(device: str | torch.device) -> torch.device:
    """Resolve the name of a device; `auto` is a GPU if PyTorch can use one, else the CPU.

    Raises:
        IntrafuseError: the named device is unknown or cannot be used.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device != "auto":
        return require_device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a tensor on the meta device, which holds no numbers.

    Raises:
        IntrafuseError: the tensor is on the meta device.
    """
    if tensor.device.type == "meta" and type(tensor) in (
        Tensor,
        nn.Parameter,
    ):  # not a subclass of Tensor
        raise IntrafuseError(
            "a tensor on the meta device holds no numbers",
            layer=name,
            remedy="load the weights first; a model that is entirely on the meta device can be "
            "traced, with inputs on the meta device",
        )


def require_device(name: str | torch.device) -> torch.device:
    """Resolve the name of a device, and test it with one tensor.

    Raises:
        IntrafuseError: the name is unknown, or the device cannot be used.

    >>> require_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise IntrafuseError(
            "unknown device", value=name, remedy="try cpu or cuda", usage=True
        ) from error
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise IntrafuseError(
            f"the device cannot be used ({str(error).splitlines()[0]})",
            value=str(name),
            remedy="try cpu",
        ) from error
    return device
