"""`intrafuse divergence`: distance of pruned networks' outputs from the original's."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions, numbers
from intrafuse.cli.output import progress, show_record
from intrafuse.cli.prune_options import PruneOptions
from intrafuse.cli.subject import Subject

__all__ = ["divergence"]


def divergence(
    model: ModelOptions,
    channels: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of channels to remove.")
    ] = "0.1,0.2,0.3",
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Methods; an unknown name lists all.")
    ] = "select,intra-fusion,moment",
    measure: Annotated[
        str, typer.Option(help="logits or softmax (L2 distance), or cosine (of the logits).")
    ] = "logits",
    layers: Annotated[bool, typer.Option("--layers", help="Measure layer by layer, too.")] = False,
    options: PruneOptions = PruneOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Measure the distance of pruned networks' outputs from the original's."""
    shares = numbers("--channels", channels, float)
    settings = options.settings(common)
    common.start()
    from intrafuse.study.evaluate.divergences import divergences

    subject = Subject.of(model, data, common)
    with progress() as advance:
        result = divergences(
            subject.model,
            subject.example_inputs,
            subject.test,
            channels=shares,
            methods=methods.split(","),
            kind=measure,  # type: ignore[arg-type]
            layers=layers,
            batch_size=data.batch_size,
            device=common.device,
            settings=settings,
            training=subject.training,
            progress=partial(advance, "measuring"),
        )
    show_record(common, "divergence", {**subject.record, **result.as_data()}, subject.title)
