"""What merging does to an architecture of the zoo: relative output error of each method.

The statistics of batch norm are estimated on random inputs first, so that they fit the weights. A
sample of the groups that go by default, spread over the network and with every kind among them,
loses a share of its channels by each method, without data. The error is the distance of the outputs
from the original's, as a share of their length, on inputs that were not seen before.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import intrafuse
from intrafuse.batches import map_tensors
from intrafuse.graph.trace import as_arguments
from intrafuse.verification import tensors_of

__all__ = ["METHODS", "compare_methods", "findings"]

METHODS = ("select", "intra-fusion", "moment", "auto")
SHARE = 0.25
GROUPS = 3  # of one network, and one of every kind
BATCHES = 8  # of random inputs, that statistics are estimated on
WORSE = 1.1  # times the error of select: what moment must not exceed


def compare_methods(model: nn.Module, inputs: Any, limit: float) -> dict[str, Any]:
    """Prune a network by every method.

    Args:
        model: in evaluation mode; its batch norms are changed.
        inputs: what it takes.
        limit: seconds for each method.

    Returns:
        method -> its relative error, or why there is none.
    """
    estimate(model, inputs)
    graph = intrafuse.trace(model, inputs)
    names = sample([group.name for group in graph.groups])
    if not names:
        return {}
    unseen = redrawn(inputs, seed=BATCHES + 1)
    before = called(model, unseen)
    found: dict[str, Any] = {}
    for method in METHODS:
        started = time.perf_counter()
        try:
            with within(limit):
                plan = intrafuse.plan(model, inputs, channels=SHARE, method=method, include=names)
            found[method] = round(error(called(plan.apply(model), unseen), before), 5)
        except TimeoutError:
            found[method] = f"over {limit:g} s"
        except intrafuse.IntrafuseError as refusal:
            found[method] = f"refused: {refusal}"[:300]
        except Exception as crash:
            found[method] = f"crashed: {type(crash).__name__}: {crash}"[:300]
        found[f"{method} seconds"] = round(time.perf_counter() - started, 1)
    return found


def findings(row: dict[str, Any]) -> list[str]:
    """List what is to be explained in a row: crashes, outputs that are not finite, moment worse."""
    errors = {method: row.get(method) for method in METHODS if method in row}
    found = [f"{k}: {e}" for k, e in errors.items() if isinstance(e, str) and "over" not in e]
    numbers = {k: e for k, e in errors.items() if isinstance(e, int | float)}
    found += [f"{k}: not finite" for k, e in numbers.items() if not math.isfinite(e)]
    select, moment = numbers.get("select"), numbers.get("moment")
    if select is not None and moment is not None and moment > WORSE * select + 1e-6:
        found.append(f"moment: {moment:.3g}, select: {select:.3g}")
    return found


def sample(names: list[str]) -> list[str]:
    """Choose names evenly, and one at least of every kind (`#heads`, `#width`)."""
    step = max(1, math.ceil(len(names) / GROUPS))
    kinds = {name.partition("#")[2].partition("#")[0]: name for name in reversed(names)}
    chosen = {*names[:: step or 1], *kinds.values()}
    return [name for name in names if name in chosen]


def estimate(model: nn.Module, inputs: Any) -> None:
    """Estimate the statistics of every batch norm on random inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.track_running_stats:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
    for seed in range(BATCHES if norms else 0):
        called(model, redrawn(inputs, seed))
    model.eval()


def redrawn(inputs: Any, seed: int) -> Any:
    """Draw other inputs like these: noise, and numbers up to the largest."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype == torch.bool or tensor.numel() == 0 or int(tensor.max()) < 2:
            return tensor
        return torch.randint(0, int(tensor.max()) + 1, tensor.shape, generator=generator).to(tensor)

    return map_tensors(draw, inputs)


@torch.no_grad()
def called(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_arguments(inputs)
    return [t.double() for t in tensors_of(model(*args, **kwargs)) if t.is_floating_point()]


def error(now: list[Tensor], before: list[Tensor]) -> float:
    """Measure the distance of outputs, as a share of the length of what they should be.

    What a network caches for its next call has other sizes, and is left out.
    """
    pairs = [(x, y) for x, y in zip(now, before, strict=True) if x.shape == y.shape]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return math.sqrt(apart / max(sum(float(y.square().sum()) for _, y in pairs), 1e-30))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
