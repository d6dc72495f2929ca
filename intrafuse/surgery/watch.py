"""Run a network on data and watch the inputs or outputs of its modules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from intrafuse.graph.trace import ExampleInputs, as_arguments, evaluating
from intrafuse.support.batches import fitting
from intrafuse.support.calls import as_library
from intrafuse.support.sums import Sums

__all__ = ["FIT", "feed", "measure", "run", "watching"]

FIT = "check that the batches fit the model, as its example inputs do"
Watched = Iterable[tuple[nn.Module, Callable[[Tensor], Any]]]


@contextmanager
def watching(watched: Watched, *, inputs: bool = False) -> Generator[None]:
    """Call functions with the outputs or inputs of modules; remove all hooks at the end.

    Args:
        watched: pairs of a module and a function. The function runs with PyTorch's own default type
            and device. A tensor that it returns replaces the output.
        inputs: call the functions with the first tensor argument of a module, by position or by
            name, instead of its output; their results are ignored.
    """
    handles: list[RemovableHandle] = []
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


def _enter(
    see: Callable[[Tensor], Any],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    see(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))


def _leave(
    see: Callable[[Tensor], Any], _module: nn.Module, _args: tuple[Any, ...], output: Tensor
) -> Any:
    return see(output)


def run(model: nn.Module, inputs: Iterable[ExampleInputs], *, advice: str = FIT) -> int:
    """Run a network in evaluation mode on batches, and return the number of batches.

    Args:
        model: the network; its mode is restored.
        inputs: batches: a tensor, a tuple of args or a mapping of kwargs.
        advice: remedy in the error if the model refuses a batch.

    Raises:
        IntrafuseError: the model refuses a batch.
    """
    with evaluating(model):
        return feed(model, inputs, advice=advice)


def feed(model: nn.Module, inputs: Iterable[ExampleInputs], *, advice: str = FIT) -> int:
    """Run a network as `run` does, without changing the mode of its modules."""
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
    inputs: Iterable[ExampleInputs],
    *,
    advice: str = FIT,
) -> tuple[dict[str, Sums], int]:
    """Sum the channels of the outputs of modules, for means and variances.

    Args:
        model: the network.
        watched: triples of a name, a module of the network, and a function that orders its output
            as (samples, channels). Outputs with the same name are summed together.
        inputs, advice: as for `run`.

    Returns:
        Sums by name, without modules that were never called, and the number of batches.
    """
    sums: dict[str, Sums] = {}

    def add(name: str, order: Callable[[Tensor], Tensor], output: Tensor) -> None:
        sums.setdefault(name, Sums()).add(order(output))

    with watching((module, partial(add, name, order)) for name, module, order in watched):
        batches = run(model, inputs, advice=advice)
    return sums, batches
