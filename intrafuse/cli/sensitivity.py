"""`intrafuse sensitivity`: measure which groups tolerate pruning, each pruned alone."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions, numbers
from intrafuse.cli.output import progress, show_record
from intrafuse.cli.prune_options import GroupOptions
from intrafuse.cli.subject import Subject

__all__ = ["sensitivity"]


def sensitivity(
    model: ModelOptions,
    channels: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of channels to remove.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Methods; an unknown name lists all.")
    ] = "select,intra-fusion,moment",
    groups: GroupOptions = GroupOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Prune each group alone, and show which groups tolerate pruning."""
    shares = numbers("--channels", channels, float)
    common.start()
    from intrafuse.study.evaluate.sensitivity import sensitivity as measure_groups

    subject = Subject.of(model, data, common)
    with progress() as advance:
        result = measure_groups(
            subject.model,
            subject.example_inputs,
            subject.test,
            shares=shares,
            methods=methods.split(","),
            **groups.chosen(),
            seed=common.seed,
            device=common.device,
            progress=partial(advance, "measuring"),
        )
    show_record(common, "sensitivity", {**subject.record, **result.as_data()}, subject.title)
