"""Run networks beside each other and measure how far their outputs are apart."""

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
        inputs: what to call it with.
        what: names the network in an error.
        seed: of random numbers that the network draws; the caller's stay as they were.
        cached: also give what the network caches for its next call, if it does so by default. Such
            tensors have the sizes of the network's inside, not of its outputs.

    Raises:
        IntrafuseError: the call fails; says what cannot run, and names the line of code.
    """
    args, kwargs = as_arguments(inputs)
    plain = nullcontext() if cached else plainly(model)
    with torch.no_grad(), evaluating(model), plain, as_called():
        torch.manual_seed(seed)  # the random state is the caller's again afterwards
        try:
            return floating(model(*args, **kwargs))
        except (Exception, SystemExit) as error:
            text = next(iter(str(error).splitlines()), "")
            raise IntrafuseError(
                f"{what} cannot run: {type(error).__name__}: {text}", layer=failing_line(error)
            ) from error


def floating(value: Any) -> list[Tensor]:
    """List the tensors with numbers of a result, in double precision."""
    wide = {True: torch.complex128, False: torch.float64}
    found = (t for t in tensors_of(value) if t.is_floating_point() or t.is_complex())
    return [t.to(wide[t.is_complex()]) for t in found]


def lively(inputs: ExampleInputs) -> ExampleInputs:
    """Replace floating inputs that are all equal, which tell nothing, by seeded noise."""
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
    found = (float(t.abs().nan_to_num(0.0, 0.0, 0.0).max()) for t in tensors if t.numel())
    return max((*found, torch.finfo(torch.float32).tiny))


def distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Find the largest difference; infinite where only one of the two is a finite number.

    Raises:
        IntrafuseError: the shapes differ.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (xs, ys)]
    if shapes[0] != shapes[1]:
        raise IntrafuseError(
            f"the pruned network must give outputs of the shapes {shapes[1]}", value=shapes[0]
        )
    found = 0.0
    for x, y in zip(xs, ys, strict=True):
        same = (x == y) | (x.isnan() & y.isnan())  # two infinities are equal
        apart = torch.where(same, torch.zeros_like(y), x - y).abs().nan_to_num(float("inf"))
        found = max(found, float(apart.max()) if apart.numel() else 0.0)
    return found
