"""Several models in, one model out: align the channels of the networks, then combine them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from intrafuse.batchnorm import fold_norms
from intrafuse.errors import IntrafuseError
from intrafuse.fusing.align import align
from intrafuse.fusing.checks import (
    check_data,
    check_networks,
    check_reference,
    check_regularisation,
    scaled_shares,
)
from intrafuse.fusing.match import require_equal_widths, require_same_structure
from intrafuse.fusing.members import Member, combine
from intrafuse.fusing.observe import activations, take
from intrafuse.fusing.restore import analytic_restore, reestimate
from intrafuse.fusing.stack import shrink, stack
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.groups import ChannelGraph
from intrafuse.methods.moment import Moment
from intrafuse.methods.settings import check_choice
from intrafuse.moments.synthetic import synthesise
from intrafuse.plan import Plan
from intrafuse.report.tables import text_table
from intrafuse.surgery import install
from intrafuse.weights import Weights

__all__ = ["Fused", "FusionReport", "fuse"]

Features = Literal["weights", "activations"]
FusionMethod = Literal["ot", "assignment", "moment"]
FusionRepair = Literal["batchnorm", "synthetic", "analytic"]
Width = Literal["first"] | float | Mapping[str, int]
DATA_REPAIRS = ("batchnorm", "synthetic")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FusionReport:
    """What a fusion was asked to do and did.

    Attributes:
        method, features, repair: as asked for.
        reference: index of the network that the others were aligned with.
        shares: the weight of each network, summing to one.
        widths: channels of each group in every network, by group name, in the order of the
            networks, and then in the fused one.
        distances: by group, how far each network's channels stayed from the reference's: 0 the
            same, 1 no better than chance; nothing for a network that was not aligned.
        sweeps: how often each network's groups were visited; 0 where it was not aligned.
        seconds: time for everything.
    """

    method: str
    features: str
    repair: str | None
    reference: int
    shares: tuple[float, ...]
    widths: Mapping[str, tuple[int, ...]]
    distances: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    sweeps: tuple[int, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        rows = []
        for name, widths in self.widths.items():
            known = self.distances.get(name, ())
            apart = ["" if value is None else f"{value:.3f}" for value in known]
            rows.append([name, *map(str, widths), ", ".join(text for text in apart if text)])
        networks = [f"network {i + 1}" for i in range(len(self.shares))]
        header = ["group", *networks, "fused", "distance"]
        title = f"{len(networks)} networks fused by {self.method} in {self.seconds:.2f} s"
        return text_table(title, header, rows, numbers=range(1, len(header)))


@dataclass(frozen=True, eq=False)
class Fused:
    """A fused network and a report.

    Attributes:
        model: the network, with batch norm folded into its layers.
        report: what was done.
        plan: how its groups were reduced, where the method or the width asked for that.
    """

    model: nn.Module
    report: FusionReport
    plan: Plan | None = None


def fuse(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    width: Width = "first",
    weights: Sequence[float] | None = None,
    features: Features = "weights",
    data: Iterable | None = None,
    samples: int = 200,
    method: FusionMethod = "ot",
    reference: int = 0,
    regularisation: float | None = None,
    seed: int = 0,
    repair: FusionRepair | None = None,
    progress: Progress | None = None,
) -> Fused:
    """Fuse networks of one architecture, trained apart, into one network.

    Args:
        models: two or more trained networks; they are not changed. They may differ in the widths
            of their channel groups.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs to trace them with.
        width: `first` gives the result the widths of the reference; a number is the share of
            these that is removed after fusion, by moments; a mapping tells the channels of groups
            by name.
        weights: what each network counts, not negative; they are scaled to sum to one. By default
            all count alike.
        features: channels are compared by the `weights` of the layers that write them, or by
            their `activations` on `data`, which serves networks that were trained from different
            starts better. For `moment`: where the moments come from.
        data: batches of inputs, or of (inputs, labels); labels are ignored.
        samples: number of inputs that activations are compared on.
        method: `ot` transports channels, whatever the widths (Singh and Jaggi, NeurIPS 2020);
            `assignment` pairs them one to one, with equal widths, in repeated sweeps (Git
            Re-Basin, ICLR 2023); `moment` stacks all networks side by side, keeps the channels
            that explain most, and re-solves their readers (ours).
        reference: index of the network whose order of channels and widths the result has.
        regularisation: of the transport: 0 exact, above 0 entropic, None by size.
        seed: seeds everything random.
        repair: `batchnorm` brings the statistics of every layer's outputs to the mean of the
            networks' own, measured on `data` (REPAIR); `synthetic` measures on inputs made from
            the batch norms; `analytic` takes what the batch norms tell, without data (`moment`
            does so anyway).
        progress: called with (networks aligned, networks in all).

    Returns:
        The fused network, with batch norm folded into its layers, and a report.

    Raises:
        IntrafuseError: the networks do not match (names the first group that differs), their
            widths differ under `assignment`, a setting is out of range, or data is missing.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
    >>> fuse([a, b], torch.zeros(1, 4)).model[0]
    Linear(in_features=4, out_features=8, bias=True)
    """
    started = time.perf_counter()
    models = check_networks(models)
    check_choice("features", features, Features)
    check_choice("method", method, FusionMethod)
    check_choice("repair", repair, FusionRepair, optional=True)
    check_data(data, features, repair, samples)
    check_regularisation(regularisation)
    shares = scaled_shares(weights, len(models))
    reference = check_reference(reference, len(models))
    graphs = [trace(model, example_inputs) for model in models]
    for number, graph in enumerate(graphs):
        require_same_structure(graphs[reference], graph, number + 1)
    if method == "assignment":
        require_equal_widths(graphs, reference)
    widths = _wanted_widths(width, graphs, graphs[reference], method)
    inputs = take(data, models[reference], samples) if features == "activations" else None
    job = _Job(models, graphs, shares, reference, example_inputs, inputs, seed)
    if repair == "synthetic":
        data = job.synthetic()
    found: dict[str, Any] = {}
    if method == "moment":
        model, plan = _merge(job, widths, data if repair in DATA_REPAIRS else None)
    else:
        solver: Any = {"solver": method, "regularisation": regularisation, "seed": seed}
        tensors, found = _average(job, solver, repair, data, progress)
        model, plan = _narrow(job, tensors, widths)
    final = plan.widths if plan is not None else _sizes(graphs[reference])
    report = FusionReport(
        method,
        features,
        repair,
        reference,
        shares,
        {name: (*(graph.by_name[name].size for graph in graphs), final[name]) for name in widths},
        **found,
        seconds=time.perf_counter() - started,
    )
    return Fused(model, report, plan)


@dataclass(frozen=True, eq=False)
class _Job:
    """The networks of a fusion that has been checked."""

    models: Sequence[nn.Module]
    graphs: Sequence[ChannelGraph]
    shares: tuple[float, ...]
    reference: int
    example_inputs: ExampleInputs
    inputs: list[Any] | None
    seed: int

    @property
    def model(self) -> nn.Module:
        """The reference network."""
        return self.models[self.reference]

    @property
    def counting(self) -> list[int]:
        """The networks whose weight is not zero."""
        return [k for k, share in enumerate(self.shares) if share > 0]

    def synthetic(self) -> list[Any]:
        """Make inputs that fit the batch norms of each network."""
        return [
            batch
            for k in self.counting
            for batch in synthesise(self.models[k], self.example_inputs, seed=self.seed + k)
        ]

    def folded(self, k: int) -> Weights:
        """Return the tensors of one network with batch norm folded."""
        weights = Weights.of(self.graphs[k], self.models[k])
        fold_norms(weights)
        return weights

    def observed(self, k: int, weights: Weights) -> Any:
        """Observe the activations of one network."""
        assert self.inputs is not None
        return activations(self.graphs[k], install(self.models[k], weights), self.inputs)


def _average(
    job: _Job,
    solver: Mapping[str, Any],
    repair: FusionRepair | None,
    data: Any,
    progress: Progress | None,
) -> tuple[Weights, dict[str, Any]]:
    """Align every network with the reference, take the weighted mean, and tell how they align."""
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
    analytic_restore(fused, members, rescale=repair == "analytic")
    if repair in DATA_REPAIRS:
        reestimate(job.model, fused, members, data)
    networks = range(len(job.models))
    told = {
        group.name: [aligned[k].distances[group.name] if k in aligned else None for k in networks]
        for group in fused.graph.groups
    }
    return fused, {
        "distances": {name: tuple(values) for name, values in told.items()},
        "sweeps": tuple(aligned[k].sweeps if k in aligned else 0 for k in networks),
    }


def _narrow(job: _Job, fused: Weights, widths: Mapping[str, int]) -> tuple[nn.Module, Plan | None]:
    """Reduce a fused network to the widths that were asked for, by moments."""
    model = install(job.model, fused)
    if widths == _sizes(fused.graph):
        return model, None
    method = Moment(source="analytic" if job.inputs is None else "calibration")
    plan = shrink(model, fused, widths, method, job.example_inputs, job.inputs, job.seed)
    return install(model, fused), plan


def _merge(job: _Job, widths: Mapping[str, int], data: Any) -> tuple[nn.Module, Plan | None]:
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
    if data is not None:
        reestimate(union, weights, [Member(union, whole, plan.maps, 1.0)], data)
    return install(union, weights), plan if plan.maps else None


def _sizes(graph: ChannelGraph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups}


def _wanted_widths(
    width: Width, graphs: Sequence[ChannelGraph], reference: ChannelGraph, method: FusionMethod
) -> dict[str, int]:
    """Decide how many channels each group shall have."""
    sizes = _sizes(reference)
    if isinstance(width, Mapping):
        for name, wanted in width.items():
            if name not in sizes:
                near = get_close_matches(str(name), sizes, n=3, cutoff=0.3) or sorted(sizes)[:3]
                raise IntrafuseError(
                    "width names no channel group",
                    value=name,
                    usage=True,
                    remedy=f"near matches: {', '.join(near)}",
                )
            most = sizes[name]
            if method == "moment":
                most = sum(graph.by_name[name].size for graph in graphs)
            if type(wanted) is not int or not 1 <= wanted <= most:
                rule = f"width must be a whole number from 1 to {most}"
                raise IntrafuseError(rule, value=wanted, layer=name, usage=True)
        return {**sizes, **width}
    if width == "first":
        return sizes
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 <= width < 1:
        raise IntrafuseError(
            'width must be "first", a share to remove in [0, 1), or channels by group',
            value=width,
            usage=True,
        )
    return {name: max(1, int(size * (1 - width) + 1e-9)) for name, size in sizes.items()}
