"""Measure the peak memory of a call of a network."""

from __future__ import annotations

import weakref
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from intrafuse.allocation.timing import device_of
from intrafuse.graph import ExampleInputs
from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.support.batches import fitting
from intrafuse.surgery.watch import FIT

__all__ = ["peak_memory"]


def peak_memory(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Measure the peak bytes of one call beyond the network and its inputs.

    On a GPU, PyTorch's allocator counts. Elsewhere, the tensors that operators return are counted
    while they live. Temporary memory inside a kernel and sparse tensors are not counted.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs, with the batch size to
            measure.

    >>> peak_memory(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4))
    40
    """
    args, kwargs = as_arguments(example_inputs)
    device = device_of(model)
    with evaluating(model), torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            with fitting("the example inputs", FIT):
                model(*args, **kwargs)
            return torch.cuda.max_memory_allocated(device) - before
        known = [*model.parameters(), *model.buffers(), *tree_leaves((args, kwargs))]
        with fitting("the example inputs", FIT), _Counting(known) as counting:
            model(*args, **kwargs)
    return counting.peak


class _Counting(TorchDispatchMode):
    """Count the bytes of tensors from their creation until they are freed."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {_address(tensor) for tensor in known if _is_counted(tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_counted(tensor) and _address(tensor) not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(_address(tensor))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, _address(tensor), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.live -= size


def _is_counted(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
