"""Calls of the library: one at a time, and apart from the caller's settings of PyTorch."""

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

# Modes of a shared model, its hooks, filters of warnings and what torch.export changes belong to
# the process. A thread that holds the lock may take it again.
_LOCK = threading.RLock()
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that have an autocast of their own
_called: list[tuple[torch.dtype, torch.device]] = []  # defaults of the caller, under the lock


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread at a time do what others would see."""
    with _LOCK:
        yield


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """Let a public function run alone, in PyTorch's plain state.

    Under `torch.autocast` it would compute in fewer digits, and under `torch.inference_mode` make
    tensors that cannot be trained. Another default type or device would reach its own tensors; the
    forward of the caller's model runs with it (`as_called`).
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
    """Let code of the caller run with the default type and device that it was called with.

    Hooks that see what it does are decorated by `as_library()`.
    """
    if not _called:
        yield
        return
    with _defaults(*_called[0]):
        yield


@contextmanager
def as_library() -> Iterator[None]:
    """Let code of the library run with PyTorch's own default type and device."""
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
