"""What `prune` does to prove its own result, whatever the method."""

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

TOLERANCE = 1e-4  # of the largest output, in single precision and finer
COARSE = 16  # units in the last place of the coarsest parameter, in half precision


@dataclass(frozen=True)
class Check:
    """How a pruned network was held against its original.

    Attributes:
        seconds: that it took.
        relative: the largest difference between outputs of the original with channels silenced and
            of the network without them, as a share of the largest output; None if not compared.
        effect: the largest change that silencing them makes, as the same share.
        note: what was not compared, and why; empty where all was.
    """

    seconds: float
    relative: float | None = None
    effect: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.relative is None:
            return f"Checked in {self.seconds:.2f} s: {self.note or 'nothing was removed'}"
        return (
            f"Checked in {self.seconds:.2f} s: the original with as many channels silenced gives "
            f"the same outputs to {self.relative:.1e} of the largest"
        )


def check(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> Check:
    """Prove a pruned network by running it.

    Its code must run what the plan says, operator by operator. Its widths, as a plan of `select`
    with channels drawn at random, must compute what the original does with the others silenced. And
    it must run by itself, in its own default mode, to finite outputs. The first two do not depend
    on the method, whose merged weights have no reference.

    Args:
        model: the original; it is not changed.
        pruned: what the plan made of it; it is not changed.
        plan: the plan.
        example_inputs: what to run both with.

    Raises:
        IntrafuseError: one of the three fails; names the groups, and the line of code where that is
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
    found = Check(0.0, 0.0, 0.0)
    for part in _parts(model, exact, room):
        like = pruned if len(part.maps) == len(exact.maps) else None
        found = _worse(found, _compared(model, part, inputs, share, like, before))
    return replace(found, seconds=time.perf_counter() - started)


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
    found = compare(model, plan, inputs, share=share, like=like, before=before)
    if found.relative > tolerance and not share:
        try:
            found = compare(model, plan, inputs, double=True, like=like)
        except IntrafuseError:
            pass  # its code insists on a type: the first comparison counts
    if found.relative <= tolerance:
        return Check(0.0, found.relative, found.effect)
    if _is_random(model, inputs, tolerance, share):
        return Check(0.0, note="its outputs differ from call to call, so that none were compared")
    raise disagreement(model, plan, inputs, found, tolerance)


def _tolerance(model: nn.Module) -> float:
    """Say how far rounding may go: by the coarsest type among the parameters."""
    units = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max(TOLERANCE, COARSE * max(units, default=0.0))


def _is_random(model: nn.Module, inputs: ExampleInputs, tolerance: float, share: bool) -> bool:
    """Tell whether the network itself gives something else at each call."""
    first, second = (
        outputs(_copied(model, share), inputs, "the network", seed=seed) for seed in (0, 1)
    )
    return distance(first, second) > tolerance * largest(first)


def _copied(model: nn.Module, share: bool) -> nn.Module:
    """Copy a network to run it: what its forward keeps or changes is not left in it."""
    return copy_without(model, [*model.parameters()] if share else [])


def _usable(
    model: nn.Module, example_inputs: ExampleInputs, share: bool
) -> tuple[ExampleInputs, list[Tensor] | None]:
    """Choose noise in place of inputs that are all equal, unless the network cannot take noise.

    Returns:
        The inputs, and what the network gives for them, where that was found out.
    """
    noise = lively(example_inputs)
    try:
        found = outputs(_copied(model, share), noise, "the network")
    except IntrafuseError:
        return example_inputs, None
    if all(bool(t.isfinite().all()) for t in found):
        return noise, found
    return example_inputs, None


def _require_running(
    model: nn.Module, pruned: nn.Module, plan: Plan, inputs: ExampleInputs, share: bool
) -> None:
    """Run the pruned network in its own default mode, caches and all; name groups if it fails."""

    def run(network: nn.Module) -> bool:
        found = outputs(_copied(network, share), inputs, "the pruned network", cached=True)
        return all(bool(t.isfinite().all()) for t in found)

    def works(steps: list[MergeMap]) -> bool:
        try:
            return run(replace(plan, maps=tuple(steps)).apply(model))
        except IntrafuseError:
            return False

    try:
        if run(pruned) or not run(model):
            return
        rule, where = "the pruned network gives outputs that are not finite", None
    except IntrafuseError as error:
        rule, where = error.rule, error.layer
        if not works([]):  # nor does the original
            raise IntrafuseError(
                f"with these example inputs the network cannot run: {rule}", layer=where
            ) from error
    guilty = culprits(plan.maps, works)
    raise IntrafuseError(
        f"{rule}, though the code that was traced does",
        layer=where,
        remedy=f"exclude={guilty} (--exclude), or check=False (--no-check) to have it all the same",
    )


def _parts(model: nn.Module, plan: Plan, room: int) -> Iterator[Plan]:
    """Divide a plan where the tensors that it touches take more bytes than there is room for."""
    size = _bytes(model)
    part: list[MergeMap] = []
    touched: set[str] = set()
    for step in plan.maps:
        own = {slot.parameter for slot in plan.graph.by_name[step.group].slots}
        if part and sum(size.get(name, 0) for name in touched | own) > room:
            yield replace(plan, maps=tuple(part))
            part, touched = [], set()
        part.append(step)
        touched |= own
    yield replace(plan, maps=tuple(part))


def _bytes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() * p.element_size() for name, p in model.named_parameters()}


def _room(model: nn.Module) -> int:
    """Say how many bytes a copy may take: two live at a time, beside what they compute."""
    return _free_memory(next(iter(model.parameters())).device) // 4


def _free_memory(device: torch.device) -> int:
    """Count the bytes that a device has free; where nobody says, there is no limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62
