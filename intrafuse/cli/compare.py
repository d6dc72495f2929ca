"""`intrafuse compare`: compare methods and amounts without fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions, numbers
from intrafuse.cli.output import progress, show_record
from intrafuse.cli.prune_options import PruneOptions
from intrafuse.cli.subject import Subject

__all__ = ["compare"]


def compare(
    model: ModelOptions,
    channels: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of channels to remove.")
    ] = "0.3,0.5,0.7",
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Methods; an unknown name lists all.")
    ] = "select,intra-fusion",
    options: PruneOptions = PruneOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Prune a network by several methods and amounts, and measure each without fine-tuning."""
    shares = numbers("--channels", channels, float)
    settings = options.settings(common)
    common.start()
    from intrafuse.study.evaluate.compare import compare as compare_methods

    subject = Subject.of(model, data, common)
    with progress() as advance:
        result = compare_methods(
            subject.model,
            subject.example_inputs,
            subject.test,
            channels=shares,
            methods=methods.split(","),
            batch_size=data.batch_size,
            device=common.device,
            settings=settings,
            training=subject.training,
            progress=partial(advance, "comparing"),
        )
    record = {**subject.record, "importance": settings.importance, **result.as_data()}
    show_record(common, "comparison", record, f"{subject.title}, {settings.importance}")
