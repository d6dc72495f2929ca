"""Run networks and measure how far their outputs differ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.graph.export import failing_line, plainly
from intrafuse.graph.trace import ExampleInputs, as_arguments, evaluating
from intrafuse.support.batches import map_tensors, tensors_of
from intrafuse.support.calls import as_called
from intrafuse.support.errors import IntrafuseError

__all__ = ["distance", "floating", "largest", "lively", "outputs"]


def outputs(
    model: nn.Module, inputs: ExampleInputs, what: str, *, seed: int = 0, cached: bool = False
) -> list[Tensor]:
    """Call a network in evaluation mode and list its floating outputs, in double precision.

    Args:
        model: the network.
        inputs: arguments of the call.
        what: name of the network in an error.
        seed: seeds random numbers of the network; the caller's random state does not change.
        cached: also return the tensors that the network caches for its next call, if it does so
            by default. These have the sizes of inner channels, not of outputs.

    Raises:
        IntrafuseError: the call fails; the error names the network and the line of code.
    """
    args, kwargs = as_arguments(inputs)
    plain = nullcontext() if cached else plainly(model)
    with torch.no_grad(), evaluating(model), plain, as_called():
        torch.manual_seed(seed)  # the caller's random state is restored afterwards
        try:
            return floating(model(*args, **kwargs))
        except (Exception, SystemExit) as error:
            text = next(iter(str(error).splitlines()), "")
            raise IntrafuseError(
                f"{what} cannot run: {type(error).__name__}: {text}", layer=failing_line(error)
            ) from error


def floating(value: Any) -> list[Tensor]:
    """List the real and complex tensors of a result, in double precision."""
    wide = {True: torch.complex128, False: torch.float64}
    tensors = (t for t in tensors_of(value) if t.is_floating_point() or t.is_complex())
    return [t.to(wide[t.is_complex()]) for t in tensors]


def lively(inputs: ExampleInputs) -> ExampleInputs:
    """Replace constant floating inputs, which reveal nothing, by seeded noise."""
    generator = torch.Generator().manual_seed(0)

    def replaced(tensor: Tensor) -> Tensor:
        if (
            not tensor.is_floating_point()
            or tensor.numel() < 2
            or bool((tensor != tensor.flatten()[0]).any())
        ):
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return map_tensors(replaced, inputs)


def largest(tensors: list[Tensor]) -> float:
    """Find the largest finite magnitude among tensors; never zero."""
    magnitudes = (float(t.abs().nan_to_num(0.0, 0.0, 0.0).max()) for t in tensors if t.numel())
    return max((*magnitudes, torch.finfo(torch.float32).tiny))


def distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Find the largest absolute difference; infinite where only one of two entries is finite.

    Raises:
        IntrafuseError: the shapes differ.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (xs, ys)]
    if shapes[0] != shapes[1]:
        raise IntrafuseError(
            f"the outputs of the pruned network must have the shapes {shapes[1]}", value=shapes[0]
        )
    largest_gap = 0.0
    for x, y in zip(xs, ys, strict=True):
        same = (x == y) | (x.isnan() & y.isnan())  # two infinities are equal
        apart = torch.where(same, torch.zeros_like(y), x - y).abs().nan_to_num(float("inf"))
        largest_gap = max(largest_gap, float(apart.max()) if apart.numel() else 0.0)
    return largest_gap
