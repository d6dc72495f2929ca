"""Check a pruned network: its code against the plan, its outputs against a masked original."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.batches import map_tensors
from intrafuse.errors import IntrafuseError
from intrafuse.graph.blocks import positions
from intrafuse.graph.compare import Expected, first_difference
from intrafuse.graph.rules import location, operator_name
from intrafuse.graph.rules.computed import COMPUTED
from intrafuse.graph.trace import ExampleInputs, as_arguments, evaluating, export_program
from intrafuse.merge import PARTS, MergeMap
from intrafuse.plan import Plan
from intrafuse.reference import run_reference

__all__ = ["Verification", "check_code", "masked", "tensors_of", "verify"]


@dataclass(frozen=True)
class Verification:
    """How far the outputs of a pruned network are from those of the masked original.

    Attributes:
        groups: how many channel groups the plan shrinks.
        difference: the largest absolute difference of any output.
        relative: the same, as a share of the largest absolute output of the masked original.
        effect: the largest absolute change that the masks make, as the same share; where it is
            next to nothing, agreement says little.
        tolerance: the largest `relative` that was accepted.
    """

    groups: int
    difference: float
    relative: float
    effect: float
    tolerance: float


def verify(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: ExampleInputs | None = None,
    tolerance: float = 1e-4,
) -> Verification:
    """Run the pruned network against a copy of the original whose dropped channels are masked.

    Args:
        model: the network that the plan was made for; it is not changed.
        plan: a plan of the method `select`, which leaves the other channels as they are.
        example_inputs: what to run both with; by default what the model was traced with. Floating
            inputs that are all equal tell nothing and are replaced by seeded noise.
        tolerance: how far the outputs may differ, as a share of the largest.

    Returns:
        The largest differences.

    Raises:
        IntrafuseError: a group is merged rather than selected, the code depends on a number of
            channels, or the outputs differ; names the group or the line.

    >>> import intrafuse
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = intrafuse.plan(net, torch.zeros(1, 4), channels=0.5, method="select")
    >>> verify(net, plan).relative < 1e-6
    True
    """
    for step in plan.maps:
        _require_selection(step)
    inputs = _choose_inputs(plan, example_inputs)
    if plan.maps and plan.graph.program is not None:
        check_code(plan.apply(model), plan, inputs, original=model)
    found = _compare(model, plan, inputs, tolerance)
    if not found.relative <= tolerance:  # NaN too
        raise _disagrees(model, plan, inputs, found)
    return found


def _disagrees(
    model: nn.Module, plan: Plan, inputs: ExampleInputs, found: Verification
) -> IntrafuseError:
    """Name the groups that alone, too, make the outputs differ, or else all."""
    alone = (replace(plan, maps=(step,)) for step in plan.maps)
    far = found.tolerance
    wrong = [p.maps[0].group for p in alone if not _agrees(model, p, inputs, far)]
    return IntrafuseError(
        f"the pruned network must compute what the masked original does to {far:g} of the largest "
        "output",
        value=found.relative,
        layer=", ".join(wrong or [step.group for step in plan.maps]),
        remedy="exclude these groups, and report the network",
    )


def _require_selection(step: MergeMap) -> None:
    if step.keep is None or any(getattr(step, part) for part in PARTS):
        raise IntrafuseError(
            "only a plan that selects channels has a masked reference, but this group is merged "
            "or repaired",
            layer=step.group,
            remedy='verify a plan with method="select" and the same budget',
        )


def _choose_inputs(plan: Plan, given: ExampleInputs | None) -> ExampleInputs:
    program = plan.graph.program
    if given is None and program is None:
        raise IntrafuseError(
            "a plan that was loaded does not know what its model takes",
            remedy="give example_inputs",
        )
    generator = torch.Generator().manual_seed(0)

    def lively(tensor: Tensor) -> Tensor:
        if (
            not tensor.is_floating_point()
            or tensor.numel() < 2
            or bool((tensor != tensor.flatten()[0]).any())
        ):
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return map_tensors(lively, program.example_inputs if given is None else given)


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy a network and silence the channels that a plan of `select` drops.

    Layers write nothing into them and read nothing out of them. Weights that are computed from
    parameters, by a norm that may not be zero, are left as they are: readers ignore their channels.
    """
    copied = copy.deepcopy(model)
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    for step in plan.maps:
        assert step.keep is not None
        group = plan.graph.by_name[step.group]
        dropped = sorted(set(range(group.size)) - set(step.keep.tolist()))
        for slot in group.readers if COMPUTED in group.chosen else group.slots:
            tensor = tensors.get(slot.parameter)
            if tensor is None or slot.kind in ("variance", "function"):
                continue
            where = torch.from_numpy(positions(slot.blocks, group.size)[dropped].ravel())
            tensor.detach().movedim(slot.axis, 0)[where.to(tensor.device)] = 0
    return copied


def _compare(model: nn.Module, plan: Plan, inputs: ExampleInputs, tolerance: float) -> Verification:
    small = _outputs(plan.apply(model), inputs)
    expected = _expected(model, plan, inputs)
    before = _outputs(model, inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (small, expected)]
    if shapes[0] != shapes[1]:
        raise IntrafuseError("the pruned network gives outputs of other shapes", value=shapes[0])
    largest = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    scale = max(largest, torch.finfo(torch.float32).tiny)
    difference = _distance(small, expected)
    effect = _distance(before, expected) / scale
    return Verification(len(plan.maps), difference, difference / scale, effect, tolerance)


def _expected(model: nn.Module, plan: Plan, inputs: ExampleInputs) -> list[Tensor]:
    """Run the masked original, norms with statistics of the channels that stay."""
    silent = masked(model, plan)
    if any(plan.graph.by_name[step.group].normed for step in plan.maps):
        return _floating(run_reference(silent, plan, inputs))
    return _outputs(silent, inputs)


def _agrees(model: nn.Module, plan: Plan, inputs: ExampleInputs, tolerance: float) -> bool:
    return _compare(model, plan, inputs, tolerance).relative <= tolerance


def _distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Find the largest difference; NaN where only one of the two is finite."""
    found = 0.0
    for x, y in zip(xs, ys, strict=True):
        apart = torch.where(x == y, torch.zeros_like(y), x - y)  # two infinities are equal
        found = max(found, float(apart.abs().max()) if apart.numel() else 0.0, key=_nan_first)
    return found


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value


@torch.no_grad()
def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    args, kwargs = as_arguments(inputs)
    with evaluating(model):
        return _floating(model(*args, **kwargs))


def _floating(value: Any) -> list[Tensor]:
    return [t.double() for t in tensors_of(value) if t.is_floating_point()]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def check_code(
    pruned: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    original: nn.Module | None = None,
) -> None:
    """Trace a pruned network and compare it with the plan, operator by operator.

    Code may hold a size as a number (a reshape, a branch, a factor such as ``x.shape[1] ** -0.5``).
    Then the pruned network would run something else than was planned.

    Args:
        pruned: what the plan made of its network.
        plan: a plan that was made, not loaded.
        example_inputs: what to trace with.
        original: the network that the plan was made for; with it, an error names the groups that
            must keep their size.

    Raises:
        IntrafuseError: an operator, a shape or a factor differs; names the line of code.
    """
    error = _fault(pruned, plan, example_inputs)
    if error is None:
        return
    remedy = "exclude the layers that write these channels, or let the code not use the number"
    if original is not None:
        guilty = _guilty(original, plan, example_inputs)
        remedy = f"exclude={guilty} (--exclude), or let the code not use the number"
    raise IntrafuseError(error.rule, layer=error.layer, remedy=remedy) from error


def _fault(pruned: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> IntrafuseError | None:
    """Find what a pruned network does otherwise than planned."""
    program = plan.graph.program
    try:
        now = export_program(pruned, example_inputs).graph.nodes
    except IntrafuseError as error:
        rule = f"the code depends on a number of channels: {error.rule}"
        return IntrafuseError(f"{rule}, but only once the network is pruned", layer=error.layer)
    expected = Expected(
        program.nodes, program.values, program.scales, program.starts, plan.graph.sizes
    )
    found = first_difference(expected, now, plan.graph.resized(plan.widths))
    if found is None:
        return None
    return IntrafuseError(
        f"the code depends on a number of channels: operator {operator_name(found.node)} "
        f"{found.rule}, but not once the network is pruned, where it is {found.value}",
        layer=location(found.node) or found.node.name,
    )


def _guilty(original: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> list[str]:
    """List groups without which the code does what was planned, found by halving."""

    def works(steps: list[MergeMap]) -> bool:
        some = replace(plan, maps=tuple(steps))
        return not steps or _fault(some.apply(original), some, example_inputs) is None

    steps, guilty = [*plan.maps], []
    while not works(steps):
        fine, failing = 0, len(steps)
        while failing - fine > 1:
            half = (fine + failing) // 2
            fine, failing = (half, failing) if works(steps[:half]) else (fine, half)
        guilty.append(steps.pop(failing - 1).group)
    return guilty
