"""Measure the latency of a network on its device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from intrafuse.graph import ExampleInputs
from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import as_called
from intrafuse.support.errors import IntrafuseError

__all__ = ["Latency", "device_of", "latencies", "latency"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, in evaluation mode.

    Attributes:
        median, lower, upper: the median and the quartiles.
        runs: number of timed calls, without warm-up calls.
        threads: number of PyTorch's CPU threads.
        device: device of the network.
    """

    median: float
    lower: float
    upper: float
    runs: int
    threads: int
    device: str


def latency(
    model: nn.Module, example_inputs: ExampleInputs, *, runs: int = 30, warm: int = 5
) -> Latency:
    """Time calls of a network on its device.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs, with the batch size to
            time.
        runs: number of timed calls.
        warm: number of warm-up calls before them.

    Raises:
        IntrafuseError: `runs` is below four, which is too few for quartiles, or the network cannot
            take the inputs.

    >>> latency(nn.Linear(4, 2), torch.zeros(1, 4), runs=8).runs
    8
    """
    return latencies({"": model}, example_inputs, runs=runs, warm=warm)[""]


def latencies(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    runs: int = 30,
    warm: int = 5,
) -> dict[str, Latency]:
    """Time several networks in turns, so that other load on the machine affects all equally.

    Args:
        models: networks on one device, by name; they are not changed.
        example_inputs, runs, warm: as for `latency`.

    Raises:
        IntrafuseError: as for `latency`.
    """
    check_arguments(runs=runs, warm=warm)
    for model in models.values():
        check_arguments(model=model)
    args, kwargs = as_arguments(example_inputs)
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack, torch.inference_mode(), as_called():
        for model in models.values():
            stack.enter_context(evaluating(model))
        for run in range(-warm, runs):
            for name, model in models.items():
                device = device_of(model)
                _wait(device)
                started = time.perf_counter()
                _call(model, args, kwargs, name)
                _wait(device)
                if run >= 0:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: _summary(times[name], device_of(model)) for name, model in models.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _summary(times: list[float], device: torch.device) -> Latency:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, lower, upper, len(times), torch.get_num_threads(), str(device))


def _call(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], name: str) -> None:
    try:
        model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntrafuseError(f"a network cannot take its inputs ({text})", value=name) from error


def _wait(device: torch.device) -> None:
    """Wait until earlier calls on a GPU end, because they run asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
