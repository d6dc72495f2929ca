"""Three ways to make one network from several: aligned mean, reduced mean and reduced union."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intrafuse.fusing.align import align
from intrafuse.fusing.members import Member, combine
from intrafuse.fusing.observe import activations
from intrafuse.fusing.restore import analytic_restore, reestimate
from intrafuse.fusing.stack import shrink, stack
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.groups import ChannelGraph
from intrafuse.methods.moment import Moment
from intrafuse.pruning.plan import Plan
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.weights import Weights

__all__ = ["Job", "average", "merge", "narrow"]


@dataclass(frozen=True, eq=False)
class Job:
    """The checked arguments of a fusion.

    Attributes:
        models, graphs: the networks and their channel graphs.
        shares: their weights, summing to one.
        reference: the index of the network whose channel order the result has.
        example_inputs: inputs for tracing.
        inputs: batches for comparing channels by activations; None to compare weights.
        repair: batches for restoring the statistics of the layers' outputs, or None.
        rescale: whether to restore these statistics from those of the batch norms.
        seed: seeds everything random.
    """

    models: Sequence[nn.Module]
    graphs: Sequence[ChannelGraph]
    shares: tuple[float, ...]
    reference: int
    example_inputs: ExampleInputs
    inputs: list[Any] | None
    repair: Iterable | None
    rescale: bool
    seed: int

    @property
    def model(self) -> nn.Module:
        """The reference network."""
        return self.models[self.reference]

    @property
    def counting(self) -> list[int]:
        """Indices of the networks whose weight is not zero."""
        return [k for k, share in enumerate(self.shares) if share > 0]

    def folded(self, k: int) -> Weights:
        """Return the tensors of one network with batch norm folded."""
        weights = Weights.of(self.graphs[k], self.models[k])
        fold_norms(weights)
        return weights

    def observed(self, k: int, weights: Weights) -> Any:
        """Observe the activations of one network."""
        assert self.inputs is not None
        return activations(self.models[k], weights, self.inputs)


def average(
    job: Job, solver: Mapping[str, Any], progress: Callable[[int, int], None] | None
) -> tuple[Weights, dict[str, Any]]:
    """Align every network with the reference and take the weighted mean.

    Args:
        job: the fusion.
        solver: arguments of `align`.
        progress: called with (networks aligned, all networks).

    Returns:
        The fused tensors, and the distances and sweeps of a `FusionReport`.
    """
    reference = job.folded(job.reference)
    watched = None if job.inputs is None else job.observed(job.reference, reference)
    members, aligned = [], {}
    for k in job.counting:
        own = reference if k == job.reference else job.folded(k)
        maps = ()
        if k != job.reference:
            pair = None if watched is None else (watched, job.observed(k, own))
            aligned[k] = align(reference, own, activations=pair, **solver)
            maps = tuple(aligned[k].maps.values())
        members.append(Member(job.models[k], own, maps, job.shares[k]))
        if progress is not None:
            progress(len(members), len(job.counting))
    fused = combine(members, reference)
    analytic_restore(fused, members, rescale=job.rescale)
    if job.repair is not None:
        reestimate(job.model, fused, members, job.repair)
    networks = range(len(job.models))
    told = {
        group.name: [aligned[k].distances[group.name] if k in aligned else None for k in networks]
        for group in fused.graph.groups
    }
    return fused, {
        "distances": {name: tuple(values) for name, values in told.items()},
        "sweeps": tuple(aligned[k].sweeps if k in aligned else 0 for k in networks),
    }


def narrow(job: Job, fused: Weights, widths: Mapping[str, int]) -> tuple[nn.Module, Plan | None]:
    """Reduce a fused network to the requested widths, by moments."""
    model = install(job.model, fused)
    if widths == fused.graph.widths:
        return model, None
    method = Moment(source="analytic" if job.inputs is None else "calibration")
    plan = shrink(model, fused, widths, method, job.example_inputs, job.inputs, job.seed)
    return install(model, fused), plan


def merge(job: Job, widths: Mapping[str, int]) -> tuple[nn.Module, Plan | None]:
    """Stack the networks, keep the channels that explain most, and re-solve their readers."""
    parts = [Weights.of(job.graphs[k], job.models[k]) for k in job.counting]
    shares = [job.shares[k] for k in job.counting]
    union = install(job.model, stack(job.graphs[job.reference], parts, shares))
    weights = Weights.of(trace(union, job.example_inputs), union)
    fold_norms(weights)
    whole = weights.snapshot()
    source = "analytic" if job.inputs is None else "calibration"
    method = Moment(transport="none", source=source)
    plan = shrink(union, weights, widths, method, job.example_inputs, job.inputs, job.seed)
    if job.repair is not None:
        reestimate(union, weights, [Member(union, whole, plan.maps, 1.0)], job.repair)
    return install(union, weights), plan if plan.maps else None
