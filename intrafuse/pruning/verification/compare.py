"""Compare a network pruned by `select` with the original whose dropped channels are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from intrafuse.graph.trace import ExampleInputs
from intrafuse.pruning.verification.code import culprits
from intrafuse.pruning.verification.fault import first_fault
from intrafuse.pruning.verification.masked import masked
from intrafuse.pruning.verification.outputs import distance, floating, largest, outputs
from intrafuse.pruning.verification.reference import run_reference
from intrafuse.support.batches import map_tensors
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.modules import copy_without
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["Difference", "compare", "disagreement"]


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two networks differ.

    Attributes:
        difference: the largest absolute difference.
        relative: the same, as a share of the largest output.
        effect: the largest change that the masks make, as the same share.
    """

    difference: float
    relative: float
    effect: float


def compare(
    model: nn.Module,
    plan: Plan,
    inputs: ExampleInputs,
    *,
    double: bool = False,
    share: bool = False,
    like: nn.Module | None = None,
    before: list[Tensor] | None = None,
) -> Difference:
    """Run copies of the pruned network, the masked original and the original.

    Args:
        model: the network; it is not changed.
        plan: a plan of `select`.
        inputs: inputs for all three.
        double: run them in double precision, to distinguish rounding from a wrong result.
        share: let the copies hold the model's own parameters where these do not change. This
            saves memory, but a forward call may change its parameters, as RWKV does.
        like: a network of the plan's widths, to copy its configuration.
        before: outputs of the original, if known.

    Raises:
        IntrafuseError: one of them cannot run, or the output shapes differ.
    """

    def run(network: nn.Module, what: str) -> list[Tensor]:
        return outputs(network.double() if double else network, given, what)

    given = map_tensors(_doubled, inputs) if double else inputs
    share = share and not double
    if before is None:
        original = copy_without(model, [*model.parameters()] if share else [])
        before = run(original, "with these example inputs the network")
        del original
    small = run(_selected(model, plan, share, like), "the pruned network")
    silent = masked(model, plan, share=share)
    if any(plan.graph.by_name[merge_map.group].normed for merge_map in plan.maps):
        silent = silent.double() if double else silent
        expected = floating(run_reference(silent, plan, given))
    else:
        expected = run(silent, "the network with its channels masked")
    scale = largest(expected)
    apart = distance(small, expected)
    return Difference(apart, apart / scale, distance(before, expected) / scale)


def _selected(
    model: nn.Module, plan: Plan, share: bool = False, like: nn.Module | None = None
) -> nn.Module:
    return install(model, plan.weights(model), share=share, like=like)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def disagreement(
    model: nn.Module, plan: Plan, inputs: ExampleInputs, difference: Difference, tolerance: float
) -> IntrafuseError:
    """Make the error for outputs that differ; it names the groups and the first operator."""
    fault = None
    if plan.graph.traced is not None:
        silent, small = masked(model, plan), _selected(model, plan)
        fault = first_fault(silent, small, plan, inputs, tolerance)

    def agrees(maps: list[MergeMap]) -> bool:
        try:
            return compare(model, plan.with_maps(maps), inputs).relative <= tolerance
        except IntrafuseError:  # one of the networks cannot run
            return False

    guilty = culprits(plan.maps, agrees) if fault is None or not fault.groups else [*fault.groups]
    begins = "" if fault is None else f"; they first differ at {fault.where}"
    return IntrafuseError(
        f"the outputs of the pruned network must equal those of the masked original to "
        f"{tolerance:g} of the largest output{begins}",
        value=difference.relative,
        layer=", ".join(guilty),
        remedy=f"exclude={guilty} (--exclude), and report the network",
    )
