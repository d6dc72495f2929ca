"""`intrafuse ablation`: test whether a setting matters, by pruning each group alone."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions, numbers
from intrafuse.cli.output import progress, show_record
from intrafuse.cli.prune_options import GroupOptions
from intrafuse.cli.subject import Subject
from intrafuse.support.errors import IntrafuseError

__all__ = ["ablation"]


def ablation(
    model: ModelOptions,
    setting: Annotated[
        str, typer.Option(help="Settings: marginals, targets, orders, normalisations or metrics.")
    ] = "marginals",
    channels: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of channels to remove.")
    ] = "0.3,0.5,0.7",
    groups: GroupOptions = GroupOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Prune each group alone with several settings, and test whether these differ."""
    shares = numbers("--channels", channels, float)
    common.start()
    from intrafuse.study.evaluate.ablation import SETTINGS
    from intrafuse.study.evaluate.ablation import ablation as measure_settings

    if setting not in SETTINGS:
        known = ", ".join(SETTINGS)
        raise IntrafuseError(f"--setting must be one of {known}", value=setting, usage=True)
    subject = Subject.of(model, data, common)
    with progress() as advance:
        result = measure_settings(
            subject.model,
            subject.example_inputs,
            subject.test,
            SETTINGS[setting],
            shares=shares,
            **groups.chosen(),
            seed=common.seed,
            device=common.device,
            progress=partial(advance, "measuring"),
        )
    record = {**subject.record, "setting": setting, **result.as_data()}
    show_record(common, "ablation", record, f"{subject.title}, {setting}")
