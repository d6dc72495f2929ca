"""`intrafuse evaluate`: measure accuracy and size of a saved network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intrafuse.cli.options import Common, DataOptions
from intrafuse.cli.output import progress, show_table, write_json

if TYPE_CHECKING:
    from torch import nn

    from intrafuse.catalog.data import Images

__all__ = ["evaluate", "load_saved"]


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `prune` or `fuse` saved.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The network before pruning, if not in the zoo."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Outputs of the network of --model.")
    ] = None,
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Measure the accuracy and the size of a saved network."""
    common.start()
    from intrafuse.study.evaluate import accuracy

    network, shape = load_saved(folder, model, num_classes)
    network = network.to(common.device)
    spec = data.spec(shape)
    test = data.images(spec, "test", data.limit)
    with progress() as advance:
        percent = accuracy(
            network,
            test,
            batch_size=data.batch_size,
            device=common.device,
            progress=partial(advance, "measuring"),
        )
    params = sum(parameter.numel() for parameter in network.parameters())
    macs = _count_macs(network, test, common.device)
    figures = {"params": params, "macs": macs, "accuracy": percent}
    write_json(
        common, "evaluation", {"folder": str(folder), **figures, "data": spec, "images": len(test)}
    )
    shown = "unknown" if macs is None else f"{macs:,}"
    row = [str(folder), f"{params:,}", shown, f"{percent:.2f}"]
    title = f"{len(test):,} images of {spec}"
    header = ["network", "parameters", "MACs", "accuracy"]
    show_table(common, title, header, [row], numbers=(1, 2, 3))


def load_saved(
    folder: Path, name: str | None, num_classes: int | None
) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Load a saved network; return it with the shape of its input, or None if unknown."""
    from intrafuse.catalog.zoo import ZOO, resolve_model
    from intrafuse.checkpoint.folder import MANIFEST, load
    from intrafuse.checkpoint.manifest import Manifest
    from intrafuse.support.errors import IntrafuseError

    if name is None and num_classes is not None:
        raise IntrafuseError("--num-classes belongs to --model", value=num_classes, usage=True)
    if name is None:
        network = load(folder)
        return network, ZOO[str(Manifest.read(folder / MANIFEST).architecture)].input_shape
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    # The shape of the input does not affect the network.
    resolved = resolve_model(name, input_shape=None if name in ZOO else (1,), **arguments)
    return load(folder, resolved.model), ZOO[name].input_shape if name in ZOO else None


def _count_macs(network: nn.Module, test: Images, device: str) -> int | None:
    """Count multiply-accumulates for one image; None if the network cannot be traced."""
    import torch

    from intrafuse.graph import trace
    from intrafuse.support.errors import IntrafuseError

    try:
        graph = trace(network, torch.zeros(1, *test.input_shape, device=device))
    except IntrafuseError:
        return None
    return graph.macs(graph.sizes)
