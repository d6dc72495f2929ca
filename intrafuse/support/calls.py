"""Run public functions one at a time, isolated from the caller's PyTorch settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["alone", "apart", "as_called", "as_library"]

P = ParamSpec("P")
R = TypeVar("R")

# Model modes, hooks, warning filters and the state that torch.export changes are shared by all
# threads of the process. A thread that holds the lock may acquire it again.
_LOCK = threading.RLock()
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # device types with their own autocast
_called: list[tuple[torch.dtype, torch.device]] = []  # the caller's defaults, guarded by the lock


@contextmanager
def alone() -> Iterator[None]:
    """Let only one thread at a time change state that all threads share."""
    with _LOCK:
        yield


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public function run in one thread at a time, with PyTorch's default state.

    Under the caller's `torch.autocast` the function would lose precision. Under
    `torch.inference_mode` it would create tensors that cannot be trained. The caller's default
    dtype and device would apply to the function's own tensors; only the forward of the caller's
    model runs with these defaults (`as_called`).
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK, ExitStack() as stack:
            _called.append((torch.get_default_dtype(), torch.get_default_device()))
            stack.callback(_called.pop)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(as_library())
            return function(*args, **kwargs)

    return call


@contextmanager
def as_called() -> Iterator[None]:
    """Run the caller's code with the default dtype and device of the caller.

    Decorate hooks on that code by `as_library()`.
    """
    if not _called:
        yield
        return
    with _defaults(*_called[0]):
        yield


@contextmanager
def as_library() -> Iterator[None]:
    """Run library code with PyTorch's initial default dtype and device."""
    with _defaults(torch.float32, torch.device("cpu")):
        yield


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            stack.enter_context(device)
        yield
