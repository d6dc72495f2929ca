"""Measure the cost of a network on its device: size, multiply-accumulates, memory, latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from intrafuse.allocation.timing import Latency, latencies
from intrafuse.graph import ExampleInputs, trace
from intrafuse.study.evaluate.memory import peak_memory
from intrafuse.support.errors import IntrafuseError

__all__ = ["Cost", "cost", "costs", "costs_record"]


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Attributes:
        params: number of parameters.
        bytes: bytes of parameters and buffers. A saved file adds a header of some kilobytes.
        macs: multiply-accumulates for one sample; None if the network cannot be traced.
        peak: peak bytes of one call beyond the network itself (`peak_memory`).
        latency: latency of one call with the example inputs.
    """

    params: int
    bytes: int
    macs: int | None
    peak: int
    latency: Latency


def cost(model: nn.Module, example_inputs: ExampleInputs, *, runs: int = 30, warm: int = 5) -> Cost:
    """Measure the cost of a network.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs, with the batch size to
            measure.
        runs: number of timed calls.
        warm: number of warm-up calls before them.

    Raises:
        IntrafuseError: as for `latency`.

    >>> import torch
    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4), runs=4).macs
    8
    """
    return costs({"": model}, example_inputs, runs=runs, warm=warm)[""]


def costs(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    runs: int = 30,
    warm: int = 5,
) -> dict[str, Cost]:
    """Measure several networks, such as those before and after pruning, timed in turns.

    Args:
        models: networks on one device, by name; they are not changed.
        example_inputs, runs, warm: as for `cost`.

    Raises:
        IntrafuseError: as for `cost`.
    """
    times = latencies(models, example_inputs, runs=runs, warm=warm)
    return {name: _cost(model, example_inputs, times[name]) for name, model in models.items()}


def costs_record(costs: Mapping[str, Cost], example_inputs: ExampleInputs) -> dict[str, Any]:
    """Return costs as JSON data. The first network is the reference for the others."""
    shapes = [list(t.shape) for t in tree_leaves(example_inputs) if isinstance(t, Tensor)]
    rows = [{"network": name, **asdict(one)} for name, one in costs.items()]
    return {"inputs": shapes, "rows": rows}


def _cost(model: nn.Module, example_inputs: ExampleInputs, took: Latency) -> Cost:
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
        peak_memory(model, example_inputs),
        took,
    )
