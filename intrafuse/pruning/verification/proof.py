"""Check the result of `prune`, for every method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from intrafuse.graph.trace import ExampleInputs
from intrafuse.pruning.verification.code import check_code, culprits
from intrafuse.pruning.verification.compare import compare, disagreement
from intrafuse.pruning.verification.masked import selecting
from intrafuse.pruning.verification.outputs import distance, largest, lively, outputs
from intrafuse.pruning.verification.verify import is_selection
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.modules import copy_without
from intrafuse.surgery.merge_map import MergeMap

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["Check", "check"]

TOLERANCE = 1e-4  # share of the largest output, in single precision or finer
COARSE = 16  # tolerance in units in the last place of the coarsest parameter's type


@dataclass(frozen=True)
class Check:
    """How a pruned network was compared with its original.

    Attributes:
        seconds: time of the check.
        relative: the largest difference between outputs of the original with masked channels and
            of the network without them, as a share of the largest output; None if not compared.
        effect: the largest change that the masks make, as the same share.
        note: why outputs were not compared; empty if they were.
    """

    seconds: float
    relative: float | None = None
    effect: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.relative is None:
            return f"Checked in {self.seconds:.2f} s: {self.note or 'nothing was removed'}"
        return (
            f"Checked in {self.seconds:.2f} s: the masked original of the same widths gives the "
            f"same outputs to {self.relative:.1e} of the largest"
        )


def check(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> Check:
    """Check a pruned network by running it.

    The check has three parts. The code must run the operators that the plan predicts. A network of
    the same widths, whose channels are selected at random, must compute what the original computes
    with the other channels masked. The pruned network must run in its own default mode and return
    finite outputs. The first two do not depend on the method: merged weights have no reference.

    Args:
        model: the original; it is not changed.
        pruned: the network that the plan returned; it is not changed.
        plan: the plan.
        example_inputs: inputs for both.

    Raises:
        IntrafuseError: one of the three fails; the error names the groups, and the line of code if
            known.
    """
    started = time.perf_counter()
    if not plan.maps:
        return Check(time.perf_counter() - started)
    if plan.graph.traced is not None:
        check_code(pruned, plan, plan.graph.traced.example_inputs, original=model)
    room = _room(model)
    share = sum(_bytes(model).values()) > room
    inputs, before = _usable(model, example_inputs, share)
    _require_running(model, pruned, plan, inputs, share)
    exact = plan if all(map(is_selection, plan.maps)) and not plan.fold else selecting(plan)
    result = Check(0.0, 0.0, 0.0)
    for part in _parts(model, exact, room):
        like = pruned if len(part.maps) == len(exact.maps) else None
        result = _worse(result, _compared(model, part, inputs, share, like, before))
    return replace(result, seconds=time.perf_counter() - started)


def _worse(first: Check, second: Check) -> Check:
    values = {}
    for name in ("relative", "effect"):
        both = getattr(first, name), getattr(second, name)
        values[name] = None if None in both else max(both)
    return Check(0.0, **values, note=first.note or second.note)


def _compared(
    model: nn.Module,
    plan: Plan,
    inputs: ExampleInputs,
    share: bool,
    like: nn.Module | None,
    before: list[Tensor] | None,
) -> Check:
    tolerance = _tolerance(model)
    difference = compare(model, plan, inputs, share=share, like=like, before=before)
    if difference.relative > tolerance and not share:
        try:
            difference = compare(model, plan, inputs, double=True, like=like)
        except IntrafuseError:
            pass  # the model's code requires its own type: the first comparison counts
    if difference.relative <= tolerance:
        return Check(0.0, difference.relative, difference.effect)
    if _is_random(model, inputs, tolerance, share):
        return Check(0.0, note="outputs differ from call to call, so they were not compared")
    raise disagreement(model, plan, inputs, difference, tolerance)


def _tolerance(model: nn.Module) -> float:
    """Return the largest relative difference that rounding explains, by the coarsest type."""
    units = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max(TOLERANCE, COARSE * max(units, default=0.0))


def _is_random(model: nn.Module, inputs: ExampleInputs, tolerance: float, share: bool) -> bool:
    """Tell whether the outputs of the network differ from call to call."""
    first, second = (
        outputs(_copied(model, share), inputs, "the network", seed=seed) for seed in (0, 1)
    )
    return distance(first, second) > tolerance * largest(first)


def _copied(model: nn.Module, share: bool) -> nn.Module:
    """Copy a network before a run, because a forward call may change its module."""
    return copy_without(model, [*model.parameters()] if share else [])


def _usable(
    model: nn.Module, example_inputs: ExampleInputs, share: bool
) -> tuple[ExampleInputs, list[Tensor] | None]:
    """Replace constant inputs by noise, unless the network fails on noise.

    Returns:
        The inputs, and the outputs for them if known.
    """
    noise = lively(example_inputs)
    try:
        before = outputs(_copied(model, share), noise, "the network")
    except IntrafuseError:
        return example_inputs, None
    if all(bool(t.isfinite().all()) for t in before):
        return noise, before
    return example_inputs, None


def _require_running(
    model: nn.Module, pruned: nn.Module, plan: Plan, inputs: ExampleInputs, share: bool
) -> None:
    """Run the pruned network in its default mode, with caches; name the groups if it fails."""

    def run(network: nn.Module) -> bool:
        tensors = outputs(_copied(network, share), inputs, "the pruned network", cached=True)
        return all(bool(t.isfinite().all()) for t in tensors)

    def works(maps: list[MergeMap]) -> bool:
        try:
            return run(plan.with_maps(maps).apply(model))
        except IntrafuseError:
            return False

    try:
        if run(pruned) or not run(model):
            return
        rule, where = "the pruned network returns outputs that are not finite", None
    except IntrafuseError as error:
        rule, where = error.rule, error.layer
        if not works([]):  # the original fails too
            raise IntrafuseError(
                f"with these example inputs the network cannot run: {rule}", layer=where
            ) from error
    guilty = culprits(plan.maps, works)
    raise IntrafuseError(
        f"{rule}; the traced code passed its check",
        layer=where,
        remedy=f"exclude={guilty} (--exclude), or check=False (--no-check) to skip the check",
    )


def _parts(model: nn.Module, plan: Plan, room: int) -> Iterator[Plan]:
    """Split a plan into parts whose tensors take at most `room` bytes."""
    size = _bytes(model)
    part: list[MergeMap] = []
    touched: set[str] = set()
    for merge_map in plan.maps:
        own = {slot.parameter for slot in plan.graph.by_name[merge_map.group].slots}
        if part and sum(size.get(name, 0) for name in touched | own) > room:
            yield plan.with_maps(part)
            part, touched = [], set()
        part.append(merge_map)
        touched |= own
    yield plan.with_maps(part)


def _bytes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() * p.element_size() for name, p in model.named_parameters()}


def _room(model: nn.Module) -> int:
    """Return the bytes that a copy may take: two copies live at a time, plus activations."""
    return _free_memory(next(iter(model.parameters())).device) // 4


def _free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; without a limit if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62
