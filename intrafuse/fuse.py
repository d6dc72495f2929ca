"""Several models in, one model out: align the channels of the networks, then combine them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from intrafuse.batchnorm import fold_norms
from intrafuse.errors import IntrafuseError
from intrafuse.fusing.align import Alignment, align
from intrafuse.fusing.match import require_equal_widths, require_same_structure
from intrafuse.fusing.members import Member, combine
from intrafuse.fusing.observe import activations, take
from intrafuse.fusing.restore import analytic_restore, reestimate
from intrafuse.graph import ExampleInputs, trace
from intrafuse.graph.groups import ChannelGraph
from intrafuse.moments.synthetic import synthesise
from intrafuse.report.tables import text_table
from intrafuse.surgery import install
from intrafuse.weights import Weights

__all__ = ["Fused", "FusionReport", "fuse"]

Features = Literal["weights", "activations"]
FusionMethod = Literal["ot", "assignment"]
FusionRepair = Literal["batchnorm", "synthetic", "analytic"]
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
    """A fused network and a report."""

    model: nn.Module
    report: FusionReport


def fuse(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
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
        weights: what each network counts, not negative; they are scaled to sum to one. By default
            all count alike.
        features: channels are compared by the `weights` of the layers that write them, or by
            their `activations` on `data`, which serves networks that were trained from different
            starts better.
        data: batches of inputs, or of (inputs, labels); labels are ignored.
        samples: number of inputs that activations are compared on.
        method: `ot` transports channels, whatever the widths (Singh and Jaggi, NeurIPS 2020);
            `assignment` pairs them one to one, with equal widths, in repeated sweeps (Git
            Re-Basin, ICLR 2023).
        reference: index of the network whose order of channels and widths the result has.
        regularisation: of the transport: 0 exact, above 0 entropic, None by size.
        seed: seeds everything random.
        repair: `batchnorm` brings the statistics of every layer's outputs to the mean of the
            networks' own, measured on `data` (REPAIR); `synthetic` measures on inputs made from
            the batch norms; `analytic` takes what the batch norms tell, without data.
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
    models = _networks(models)
    _check_choices(features=features, method=method, repair=repair)
    _check_data(data, features, repair, samples)
    shares = _shares(weights, len(models))
    if not -len(models) <= reference < len(models):
        raise IntrafuseError(
            f"reference must be the index of one of {len(models)} networks",
            value=reference,
            usage=True,
        )
    reference %= len(models)
    graphs = [trace(model, example_inputs) for model in models]
    for number, graph in enumerate(graphs):
        require_same_structure(graphs[reference], graph, number + 1)
    if method == "assignment":
        require_equal_widths(graphs, reference)
    folded = [_folded(graph, model) for graph, model in zip(graphs, models, strict=True)]
    inputs = None
    if features == "activations":
        inputs = take(data, models[reference], samples)

    def observed(k: int) -> Any:
        network = install(models[k], folded[k])
        return None if inputs is None else activations(graphs[k], network, inputs)

    seen = observed(reference) if inputs is not None else None
    aligned: list[Alignment | None] = []
    for k, share in enumerate(shares):
        apart = k != reference and share > 0
        pair = (seen, observed(k)) if apart and inputs is not None else None
        settings = {"solver": method, "regularisation": regularisation, "seed": seed}
        aligned.append(
            align(folded[reference], folded[k], activations=pair, **settings) if apart else None
        )
        if progress is not None:
            progress(k + 1, len(models))
    members = [
        Member(models[k], folded[k], tuple(a.maps.values()) if a is not None else (), share)
        for k, (share, a) in enumerate(zip(shares, aligned, strict=True))
        if share > 0
    ]
    fused = combine(members, folded[reference])
    if repair == "synthetic":
        data = [
            batch
            for k, share in enumerate(shares)
            if share > 0
            for batch in synthesise(models[k], example_inputs, seed=seed + k)
        ]
    analytic_restore(fused, members, rescale=repair == "analytic")
    if repair in ("batchnorm", "synthetic"):
        reestimate(models[reference], fused, members, data)
    model = install(models[reference], fused)
    report = FusionReport(
        method,
        features,
        repair,
        reference,
        shares,
        _widths(graphs, fused),
        {g.name: _distances(g.name, aligned) for g in graphs[reference].groups},
        tuple(0 if a is None else a.sweeps for a in aligned),
        time.perf_counter() - started,
    )
    return Fused(model, report)


def _folded(graph: ChannelGraph, model: nn.Module) -> Weights:
    weights = Weights.of(graph, model)
    fold_norms(weights)
    return weights


def _widths(graphs: Sequence[ChannelGraph], fused: Weights) -> dict[str, tuple[int, ...]]:
    return {
        group.name: (
            *(graph.by_name[group.name].size for graph in graphs),
            fused.sizes[group.id],
        )
        for group in fused.graph.groups
    }


def _distances(name: str, aligned: Sequence[Alignment | None]) -> tuple[float | None, ...]:
    return tuple(None if a is None else a.distances[name] for a in aligned)


# --- checks -------------------------------------------------------------------------------------


def _networks(models: object) -> list[nn.Module]:
    if isinstance(models, nn.Module | str) or not isinstance(models, Iterable):
        raise IntrafuseError(
            "fusion takes a list of networks",
            value=type(models).__name__,
            usage=True,
            remedy="fuse([a, b], example_inputs)",
        )
    networks = list(models)
    for model in networks:
        if not isinstance(model, nn.Module):
            raise IntrafuseError(
                "a network must be a torch.nn.Module", value=type(model).__name__, usage=True
            )
    if len(networks) < 2:
        raise IntrafuseError("fusion needs two networks or more", value=len(networks), usage=True)
    return networks


def _check_choices(**chosen: str | None) -> None:
    known = {"features": Features, "method": FusionMethod, "repair": FusionRepair}
    for setting, value in chosen.items():
        allowed = get_args(known[setting])
        if value not in allowed and not (setting == "repair" and value is None):
            names = ", ".join(allowed) + (", or None" if setting == "repair" else "")
            raise IntrafuseError(f"{setting} must be one of {names}", value=value, usage=True)


def _check_data(data: object, features: str, repair: str | None, samples: int) -> None:
    """Refuse missing data before anything is computed."""
    needs = {
        'features="activations"': features == "activations",
        "repair of batch norm": repair == "batchnorm",
    }
    for purpose, needed in needs.items():
        if needed and data is None:
            raise IntrafuseError(
                f"{purpose} needs unlabelled data",
                usage=True,
                remedy="give data=, batches of inputs (on the command line --data)",
            )
    if isinstance(data, Iterator):
        raise IntrafuseError(
            "data must be readable more than once: a list of batches or a loader",
            value=type(data).__name__,
            remedy="list(batches)",
        )
    if not (type(samples) is int and samples > 0):
        raise IntrafuseError("samples must be a whole number above 0", value=samples, usage=True)


def _shares(weights: Sequence[float] | None, networks: int) -> tuple[float, ...]:
    """Scale the networks' weights to sum to one."""
    if weights is None:
        return (1 / networks,) * networks
    given = [float(weight) for weight in weights]
    if len(given) != networks:
        raise IntrafuseError(
            f"weights must be {networks} numbers, one for each network", value=given, usage=True
        )
    if not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) <= 0:
        raise IntrafuseError(
            "weights must be finite, not negative, and not all zero", value=given, usage=True
        )
    return tuple(weight / sum(given) for weight in given)
