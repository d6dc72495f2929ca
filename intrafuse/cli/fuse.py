"""`intrafuse fuse`: fuse several trained networks into one and save it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.options import (
    Common,
    DataOptions,
    InputShape,
    ModelName,
    ModelOptions,
    NumClasses,
    numbers,
)
from intrafuse.cli.output import Advance, progress, show_note, show_record
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.catalog.data import Images
    from intrafuse.catalog.zoo import ResolvedModel
    from intrafuse.fusing.fuse import Fused

__all__ = ["fuse"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options that name the architecture and the files of the networks."""

    model: ModelName
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Safetensors or DIR of one network; repeatable."),
    ] = None
    num_classes: NumClasses = None
    input_shape: InputShape = None

    def resolve(self, device: str) -> list[ResolvedModel]:
        """Build the networks on a device."""
        if len(self.weights or ()) < 2:
            raise IntrafuseError(
                "fusing needs the weights of at least two networks",
                value=[str(path) for path in self.weights or ()],
                usage=True,
                remedy="give --weights once for each network",
            )
        return [self._one(path, device) for path in self.weights or ()]

    def _one(self, path: Path, device: str) -> ResolvedModel:
        from intrafuse.checkpoint.folder import load

        known = {"num_classes": self.num_classes, "input_shape": self.input_shape}
        folder = path.is_dir()
        options = ModelOptions(model=self.model, weights=None if folder else path, **known)
        resolved = options.resolve(device)
        resolved = replace(resolved, model=deepcopy(resolved.model))  # MODEL may name one module
        if folder:
            load(path, resolved.model)
        return resolved


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """Settings of fusing."""

    method: Annotated[str, typer.Option(help="Method: ot, assignment or moment.")] = "ot"
    features: Annotated[
        str, typer.Option(help="Features to compare: weights, or activations on --data.")
    ] = "weights"
    samples: Annotated[int, typer.Option(min=1, help="Number of inputs for activations.")] = 200
    shares: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Weight of each network, such as 2,1.")
    ] = None
    reference: Annotated[
        int, typer.Option(min=0, help="Index of the network that sets order and widths.")
    ] = 0
    width: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of channels to remove afterwards."),
    ] = None
    regularisation: Annotated[
        float | None, typer.Option(min=0, help="0: exact; above 0: entropic; default: by size.")
    ] = None
    repair: Annotated[
        str | None,
        typer.Option(help="Repair of statistics: batchnorm (needs --data), synthetic or analytic."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `intrafuse.fuse`."""
        return {
            "method": self.method,
            "features": self.features,
            "samples": self.samples,
            "weights": None if self.shares is None else numbers("--shares", self.shares, float),
            "reference": self.reference,
            "width": "first" if self.width is None else self.width,
            "regularisation": self.regularisation,
            "repair": self.repair,
        }


def fuse(
    networks: NetworkOptions,
    options: FuseOptions = FuseOptions(),
    data: DataOptions = DataOptions(),
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to save the network in.")
    ] = None,
    common: Common = Common(),
) -> None:
    """Fuse separately trained networks into one, and save it."""
    settings = options.settings()
    common.start()
    import intrafuse
    from intrafuse.checkpoint.folder import usable

    if out is not None:
        usable(out)
    resolved = networks.resolve(common.device)
    files = [str(path) for path in networks.weights or ()]
    test = None if data.data is None else data.images(data.data, "test", data.limit)
    with progress() as advance:
        fused = intrafuse.fuse(
            [network.model for network in resolved],
            resolved[0].example_inputs,
            data=data.batches(data.data, common),
            seed=common.seed,
            progress=partial(advance, "aligning"),
            **settings,
        )
        figures = _measure(resolved, fused, test, data.batch_size, common.device, advance)
    if out is not None:
        _save(out, fused, networks, resolved, options.reference, figures)
    sizes = [sum(p.numel() for p in network.model.parameters()) for network in resolved]
    show_record(common, "fusion", _data(networks.model, files, sizes, fused, figures, out))
    if out is not None:
        show_note(f"saved in {out}")


def _measure(
    resolved: list[ResolvedModel],
    fused: Fused,
    test: Images | None,
    batch_size: int,
    device: str,
    advance: Advance,
) -> dict[str, Any]:
    """Measure the accuracy of every network and of the fused one; empty without data."""
    from intrafuse.study.evaluate import accuracy

    if test is None:
        return {}
    accuracies = []
    for number, network in enumerate([*(r.model for r in resolved), fused.model]):
        name = f"accuracy of network {number + 1}" if number < len(resolved) else "accuracy"
        bar = partial(advance, name)
        percent = accuracy(network, test, batch_size=batch_size, device=device, progress=bar)
        accuracies.append(percent)
    return {
        "data": test.name,
        "images": len(test),
        "accuracy_of_networks": accuracies[:-1],
        "accuracy": accuracies[-1],
    }


def _save(
    out: Path,
    fused: Fused,
    networks: NetworkOptions,
    resolved: list[ResolvedModel],
    reference: int,
    figures: dict[str, Any],
) -> None:
    from intrafuse.catalog.zoo import file_sha256
    from intrafuse.checkpoint.folder import PLAN, WEIGHTS, save
    from intrafuse.pruning.plan import Plan

    source, plan = (networks.weights or ())[reference], fused.plan
    if source.is_dir():  # a plan may have made it smaller than the architecture
        if plan is None and (source / PLAN).exists():
            plan = Plan.load(source / PLAN)
        source = source / WEIGHTS
    save(
        out,
        fused.model,
        architecture=networks.model,
        arguments=resolved[0].arguments,
        source_sha256=file_sha256(source),
        figures=figures,
        plan=plan,
    )


def _data(
    name: str,
    files: list[str],
    sizes: list[int],
    fused: Fused,
    figures: dict[str, Any],
    out: Path | None,
) -> dict[str, Any]:
    report = fused.report
    return {
        "model": name,
        "networks": files,
        "sizes": sizes,
        "method": report.method,
        "features": report.features,
        "repair": report.repair,
        "reference": report.reference,
        "weights": list(report.shares),
        "widths": {group: list(widths) for group, widths in report.widths.items()},
        "distances": {group: list(values) for group, values in report.distances.items()},
        "sweeps": list(report.sweeps),
        "params": sum(parameter.numel() for parameter in fused.model.parameters()),
        "seconds": report.seconds,
        "figures": figures,
        "out": None if out is None else str(out),
    }
