"""Fuse several networks into one: align their channels, then combine them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from intrafuse.fusing.checks import (
    Width,
    check_data,
    check_networks,
    check_reference,
    check_regularisation,
    scaled_shares,
    wanted_widths,
)
from intrafuse.fusing.job import Job, average, merge, narrow
from intrafuse.fusing.match import require_equal_widths, require_same_structure
from intrafuse.fusing.observe import take
from intrafuse.graph import ExampleInputs, trace
from intrafuse.moments.synthetic import synthesise
from intrafuse.pruning.plan import Plan
from intrafuse.support.arguments import check_arguments, check_choice
from intrafuse.support.calls import apart
from intrafuse.support.tables import text_table

__all__ = ["Fused", "FusionReport", "fuse"]

Features = Literal["weights", "activations"]
FusionMethod = Literal["ot", "assignment", "moment"]
FusionRepair = Literal["batchnorm", "synthetic", "analytic"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FusionReport:
    """Settings and result of a fusion.

    Attributes:
        method, features, repair: the settings.
        reference: index of the network that the others were aligned with.
        shares: the weight of each network, summing to one.
        widths: channels of each group, by group name: in each network, in their order, then in the
            fused network.
        distances: distance of each network's channels from the reference's after alignment, by
            group name: 0 for equal channels, 1 for no better than chance, None for a network
            that was not aligned.
        sweeps: passes over the groups of each network; 0 if it was not aligned.
        seconds: time of the whole fusion.
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
        report: settings and result.
        plan: the plan that reduced its groups; None if the widths were not reduced.
    """

    model: nn.Module
    report: FusionReport
    plan: Plan | None = None


@apart
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
        width: `first` keeps the widths of the reference. A number is the share of these to remove
            after fusion, by moments. A mapping sets the channels of groups by name.
        weights: weight of each network, not negative; they are scaled to sum to one. By default
            all networks have the same weight.
        features: compare channels by the `weights` of the layers that write them, or by their
            `activations` on `data`, which is better for networks trained from different
            initializations. For `moment`: the source of the moments.
        data: batches of inputs, or of (inputs, labels); labels are ignored.
        samples: number of inputs for comparing activations.
        method: `ot` transports channels, at any widths (Singh and Jaggi, NeurIPS 2020);
            `assignment` pairs them one to one, with equal widths, in repeated sweeps (Git
            Re-Basin, ICLR 2023); `moment` stacks all networks side by side, keeps the channels
            that explain most, and re-solves their readers (ours).
        reference: index of the network whose order of channels and widths the result has.
        regularisation: regularization of the transport: 0 is exact, above 0 entropic; None
            chooses by size.
        seed: seeds everything random.
        repair: `batchnorm` rescales every layer's outputs to the mean statistics of the networks,
            measured on `data` (REPAIR). `synthetic` measures them on inputs made from the batch
            norms. `analytic` takes them from the batch norms without data (`moment` always does).
        progress: called with (networks aligned, all networks).

    Returns:
        The fused network, with batch norm folded into its layers, and a report.

    Raises:
        IntrafuseError: the networks do not match (the error names the first group that differs),
            their widths differ under `assignment`, a setting is out of range, or data is missing.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
    >>> fuse([a, b], torch.zeros(1, 4)).model[0]
    Linear(in_features=4, out_features=8, bias=True)
    """
    started = time.perf_counter()
    check_choice("features", features, Features)
    check_choice("method", method, FusionMethod)
    check_choice("repair", repair, FusionRepair, optional=True)
    check_arguments(seed=seed, progress=progress)
    check_data(data, features, repair, samples)
    check_regularisation(regularisation)
    models = check_networks(models)
    shares = scaled_shares(weights, len(models))
    reference = check_reference(reference, len(models))
    graphs = [trace(model, example_inputs) for model in models]
    for number, graph in enumerate(graphs):
        require_same_structure(graphs[reference], graph, number + 1)
    if method == "assignment":
        require_equal_widths(graphs, reference)
    widths = wanted_widths(width, graphs, graphs[reference], method)
    inputs = take(data, models[reference], samples) if features == "activations" else None
    if repair == "synthetic":
        counting = [k for k, share in enumerate(shares) if share > 0]
        made = (synthesise(models[k], example_inputs, seed=seed + k) for k in counting)
        data = [batch for batches in made for batch in batches]
    restoring = data if repair in ("batchnorm", "synthetic") else None
    analytic = repair == "analytic"
    job = Job(models, graphs, shares, reference, example_inputs, inputs, restoring, analytic, seed)
    alignment: dict[str, Any] = {}
    if method == "moment":
        model, plan = merge(job, widths)
    else:
        solver: Any = {"solver": method, "regularisation": regularisation, "seed": seed}
        tensors, alignment = average(job, solver, progress)
        model, plan = narrow(job, tensors, widths)
    final = plan.widths if plan is not None else graphs[reference].widths
    told = {name: (*(g.by_name[name].size for g in graphs), final[name]) for name in widths}
    seconds = time.perf_counter() - started
    report = FusionReport(
        method, features, repair, reference, shares, told, **alignment, seconds=seconds
    )
    return Fused(model, report, plan)
