"""`intrafuse compare`: several methods and amounts side by side, without fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from intrafuse.cli.options import RANDOM, Common, DataOptions, ModelOptions, PruneOptions, numbers
from intrafuse.cli.output import progress, show_note, show_table, write_json

__all__ = ["compare"]


def compare(
    model: ModelOptions,
    channels: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of channels to remove.")
    ] = "0.3,0.5,0.7",
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Methods; an unknown one lists all.")
    ] = "select,intra-fusion",
    options: PruneOptions = PruneOptions(),
    data: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Prune a network by several methods and amounts, and measure each without fine-tuning."""
    shares = numbers("--channels", channels, float)
    settings = options.settings()
    common.start()
    import intrafuse
    from intrafuse.evaluate.compare import compare as compare_methods
    from intrafuse.graph.trace import as_arguments

    resolved = model.resolve(common.device)
    if model.is_random:
        show_note(RANDOM)
    args, kwargs = as_arguments(resolved.example_inputs)
    spec = data.spec(tuple((*args, *kwargs.values())[0].shape[1:]))
    test = data.images(spec, "test", data.limit)
    with progress() as advance:
        found = compare_methods(
            resolved.model,
            resolved.example_inputs,
            test,
            channels=shares,
            methods=methods.split(","),
            batch_size=data.batch_size,
            device=common.device,
            prune=partial(
                intrafuse.prune, data=data.batches(spec, common), seed=common.seed, **settings
            ),
            progress=partial(advance, "comparing"),
        )
    write_json(common, found.as_data())
    title = f"{model.model}, {options.importance}, {len(test):,} images of {spec}"
    show_table(common, title, *found.table())
