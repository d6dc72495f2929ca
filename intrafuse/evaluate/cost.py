"""What a network costs where it runs: size, multiply-accumulates, memory, latency."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from intrafuse.errors import IntrafuseError
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.trace import as_arguments, evaluating

__all__ = ["Cost", "Latency", "cost", "latency"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, in evaluation mode.

    Attributes:
        median, lower, upper: the median and the quartiles.
        runs: calls that were timed, after those that warmed up.
        threads: of PyTorch on the CPU.
        device: where it ran.
    """

    median: float
    lower: float
    upper: float
    runs: int
    threads: int
    device: str


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        params: parameters.
        bytes: of parameters and buffers, which is nearly the size of a saved file.
        macs: multiply-accumulates for one sample; None where the network cannot be traced.
        peak: most bytes that a call took beyond the network, on a GPU; None elsewhere.
        latency: of one call with the example inputs.
    """

    params: int
    bytes: int
    macs: int | None
    peak: int | None
    latency: Latency


def latency(
    model: nn.Module, example_inputs: ExampleInputs, *, runs: int = 30, warm: int = 5
) -> Latency:
    """Time calls of a network on the device where it is.

    Args:
        model: the network; left as it was.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs; their batch counts.
        runs: calls that are timed.
        warm: calls before these.

    Raises:
        IntrafuseError: fewer than four runs, which have no quartiles.

    >>> latency(nn.Linear(4, 2), torch.zeros(1, 4), runs=8).runs
    8
    """
    if runs < 4:
        raise IntrafuseError("latency needs four runs or more", value=runs, usage=True)
    args, kwargs = as_arguments(example_inputs)
    device = _device(model)
    times = []
    with evaluating(model), torch.inference_mode():
        for run in range(-warm, runs):
            _wait(device)
            started = time.perf_counter()
            model(*args, **kwargs)
            _wait(device)
            if run >= 0:
                times.append(1000 * (time.perf_counter() - started))
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, lower, upper, runs, torch.get_num_threads(), str(device))


def cost(model: nn.Module, example_inputs: ExampleInputs, *, runs: int = 30, warm: int = 5) -> Cost:
    """Measure what a network costs.

    Args:
        model: the network; left as it was.
        example_inputs, runs, warm: as for `latency`.

    Raises:
        IntrafuseError: as for `latency`.
    """
    try:
        graph = trace(model, example_inputs)
        macs = graph.macs(graph.sizes)
    except IntrafuseError:
        macs = None
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        macs,
        _peak(model, example_inputs),
        latency(model, example_inputs, runs=runs, warm=warm),
    )


def _peak(model: nn.Module, example_inputs: ExampleInputs) -> int | None:
    """Measure how many bytes one call takes beyond what is in use before it."""
    device = _device(model)
    if device.type != "cuda":
        return None
    args, kwargs = as_arguments(example_inputs)
    with evaluating(model), torch.inference_mode():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(*args, **kwargs)
        return torch.cuda.max_memory_allocated(device) - before


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _wait(device: torch.device) -> None:
    """Let the calls before end, where they run beside this program."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
