"""`intrafuse cost`: measure size, memory and latency of networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intrafuse.cli.evaluate import load_saved
from intrafuse.cli.options import Common, InputShape, NumClasses, numbers
from intrafuse.cli.output import show_record
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cost"]


def cost(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="NETWORK...",
            help="MODEL, or DIR of a saved network; the first is the reference for the others.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The network before pruning, if not in the zoo."),
    ] = None,
    num_classes: NumClasses = None,
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    runs: Annotated[int, typer.Option(min=4, help="Timed calls.")] = 30,
    common: Common = Common(),
) -> None:
    """Measure parameters, MACs, bytes, peak memory and latency on a device."""
    if len(set(networks)) < len(networks):
        raise IntrafuseError("name each NETWORK only once", value=" ".join(networks), usage=True)
    common.start()
    import torch

    from intrafuse.catalog.zoo import resolve_model
    from intrafuse.study.evaluate.cost import costs, costs_record

    shape = None if input_shape is None else tuple(numbers("--input-shape", input_shape, int))
    models: dict[str, nn.Module] = {}
    for name in networks:
        if Path(name).is_dir():
            network, known = load_saved(Path(name), model, num_classes)
        else:
            arguments = {} if num_classes is None else {"num_classes": num_classes}
            resolved = resolve_model(name, input_shape=shape, **arguments)
            network, known = resolved.model, resolved.input_shape
        shape = shape or known
        models[name] = network.to(common.device)
    if shape is None:
        raise IntrafuseError(
            "the shape of the input is unknown",
            value=networks[0],
            usage=True,
            remedy="give --input-shape C,H,W",
        )
    example = torch.zeros(batch, *shape, device=common.device)
    measured = costs(models, example, runs=runs)
    show_record(common, "cost", costs_record(measured, example))
