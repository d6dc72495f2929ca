"""Run a network on data and watch what its modules are given or put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.support.batches import fitting
from intrafuse.support.calls import as_library
from intrafuse.support.sums import Sums

__all__ = ["FIT", "feed", "measure", "run", "watching"]

FIT = "check that the batches fit the model, as its example inputs do"
Watched = Iterable[tuple[nn.Module, Callable[[Tensor], Any]]]


@contextmanager
def watching(watched: Watched, *, inputs: bool = False) -> Iterator[None]:
    """Call functions with what modules put out, or are given; all hooks come off at the end.

    Args:
        watched: modules, and for each the function. It runs with PyTorch's own default type and
            device. A tensor that it returns goes on in place of the output.
        inputs: give the functions the first tensor that a module is called with instead, by
            position or by name; what they return is ignored.
    """
    handles = []
    try:
        for module, see in watched:
            if inputs:
                hook = partial(_enter, as_library()(see))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(_leave, as_library()(see))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(see: Callable[[Tensor], Any], _module: nn.Module, args: tuple, kwargs: dict) -> None:
    see(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))


def _leave(see: Callable[[Tensor], Any], _module: nn.Module, _args: tuple, output: Tensor) -> Any:
    return see(output)


def run(model: nn.Module, inputs: Iterable, *, advice: str = FIT) -> int:
    """Run a network in evaluation mode on batches, for what is watched, and count them.

    Args:
        model: left in the mode that it was in.
        inputs: batches: a tensor, a tuple of args or a mapping of kwargs.
        advice: what the user can do where the model refuses a batch.

    Raises:
        IntrafuseError: the model refuses a batch.
    """
    with evaluating(model):
        return feed(model, inputs, advice=advice)


def feed(model: nn.Module, inputs: Iterable, *, advice: str = FIT) -> int:
    """Run a network as `run` does, in whatever mode its modules are."""
    count = 0
    with torch.no_grad():
        for count, batch in enumerate(inputs, 1):
            args, kwargs = as_arguments(batch)
            with fitting(f"batch {count} of the data", advice):
                model(*args, **kwargs)
    return count


def measure(
    model: nn.Module,
    watched: Iterable[tuple[str, nn.Module, Callable[[Tensor], Tensor]]],
    inputs: Iterable,
    *,
    advice: str = FIT,
) -> tuple[dict[str, Sums], int]:
    """Measure the channels of what modules put out.

    Args:
        model: the network.
        watched: a name, a module of the network, and how to order its output as (samples,
            channels). What has the same name is measured together.
        inputs, advice: as for `run`.

    Returns:
        Sums by name, of the modules that were called, and the number of batches.
    """
    sums: dict[str, Sums] = {}

    def add(name: str, order: Callable[[Tensor], Tensor], output: Tensor) -> None:
        sums.setdefault(name, Sums()).add(order(output))

    with watching((module, partial(add, name, order)) for name, module, order in watched):
        batches = run(model, inputs, advice=advice)
    return sums, batches
