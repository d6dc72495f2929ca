"""Watch the inputs of modules while a network runs, where gradients must flow through them.

Without gradients, `intrafuse.sweep.walk` sees more: functions and tied weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from intrafuse.support.calls import as_library

__all__ = ["FIT", "watching"]

FIT = "check that the batches fit the model, as its example inputs do"
Watched = Iterable[tuple[nn.Module, Callable[[Tensor], Any]]]


@contextmanager
def watching(watched: Watched) -> Generator[None]:
    """Call functions with the inputs of modules; remove all hooks at the end.

    Args:
        watched: pairs of a module and a function, which is called with the first tensor argument
            of the module, by position or by name. It runs with PyTorch's own default type and
            device; its result is ignored.
    """
    handles: list[RemovableHandle] = []
    try:
        for module, see in watched:
            hook = partial(_enter, as_library()(see))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(
    see: Callable[[Tensor], Any],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    see(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
