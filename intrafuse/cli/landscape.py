"""`intrafuse landscape`: accuracy on the plane through a network and two pruned versions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions
from intrafuse.cli.output import progress, show_record
from intrafuse.cli.prune_options import PruneOptions
from intrafuse.cli.subject import Subject
from intrafuse.support.errors import IntrafuseError

__all__ = ["landscape"]


def landscape(
    model: ModelOptions,
    channels: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of channels to remove.")
    ] = 0.5,
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Two methods; an unknown name lists all.")
    ] = "intra-fusion,select",
    measure: Annotated[str, typer.Option(help="Quantity: accuracy or loss.")] = "accuracy",
    points: Annotated[int, typer.Option(min=2, help="Grid points in each direction.")] = 21,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Store values here; a later run resumes from it."),
    ] = None,
    options: PruneOptions = PruneOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Measure accuracy or loss on the plane through a network and two pruned versions of it."""
    names = methods.split(",")
    if len(set(names)) != 2 or len(names) != 2:
        raise IntrafuseError("--methods takes two different methods", value=methods, usage=True)
    settings = options.settings(common)
    common.start()
    import intrafuse
    from intrafuse.study.evaluate.landscape import landscape as measure_plane

    subject = Subject.of(model, data, common)
    plans = {
        name: intrafuse.prune(
            subject.model,
            subject.example_inputs,
            settings,
            channels=channels,
            method=name,
            data=subject.training,
        ).plan
        for name in names
    }
    with progress() as advance:
        result = measure_plane(
            subject.model,
            plans,
            subject.test,
            kind=measure,  # type: ignore[arg-type]
            points=points,
            state=state,
            batch_size=data.batch_size,
            device=common.device,
            progress=partial(advance, "measuring"),
        )
    record = {**subject.record, "channels_removed": channels, **result.as_data()}
    show_record(common, "landscape", record, f"{subject.title}, {channels:.0%} removed")
