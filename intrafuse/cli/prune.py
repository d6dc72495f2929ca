"""`intrafuse prune`: make a network smaller and save it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.method import MethodOptions
from intrafuse.cli.options import RANDOM, Common, DataOptions, ModelOptions
from intrafuse.cli.output import Advance, progress, show_note, show_table, write_json
from intrafuse.cli.prune_options import PruneOptions
from intrafuse.cli.stream import StreamOptions, stream

if TYPE_CHECKING:
    from intrafuse.catalog.data import Images
    from intrafuse.catalog.zoo import ResolvedModel
    from intrafuse.pruning.result import Pruned
    from intrafuse.pruning.settings import Settings

__all__ = ["prune"]

RUNS = 10  # timed calls for the latency in the record


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The budget: exactly one option must be given."""

    channels: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of channels to remove.")
    ] = None
    params: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of parameters to remove.")
    ] = None
    macs: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of MACs to remove.")
    ] = None
    latency: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of latency to remove.")
    ] = None


def prune(
    model: ModelOptions,
    budget: BudgetOptions = BudgetOptions(),
    method: MethodOptions = MethodOptions(),
    options: PruneOptions = PruneOptions(),
    data: DataOptions = DataOptions(),
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to save the network in.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run the pruned network as a check, also against the original.")
    ] = True,
    streaming: StreamOptions = StreamOptions(),
    common: Common = Common(),
) -> None:
    """Make a network smaller, and save it."""
    streaming.require_use()
    settings = options.settings(common, method=method.build(), **asdict(budget))
    common.start()
    if streaming.stream:
        return stream(model, settings, streaming, data, out, common)
    import intrafuse
    from intrafuse.checkpoint.folder import usable

    _ = settings.wanted  # refuses a missing budget before any work
    if out is not None:
        usable(out)
    resolved = model.resolve(common.device)
    if model.is_random:
        show_note(RANDOM)
    test = None if data.data is None else data.images(data.data, "test", data.limit)
    with progress() as advance:
        pruned = intrafuse.prune(
            resolved.model,
            resolved.example_inputs,
            settings,
            data=data.batches(data.data, common),
            check=check,
            progress=partial(advance, "planning"),
        )
        figures = _measure(resolved, pruned, test, data.batch_size, common.device, advance)
    if out is not None:
        _save(out, pruned, model, resolved, figures, settings)
    record = {**model.record(), **_data(resolved, pruned, figures, out)}
    write_json(common, "pruning", record)
    _show(common, pruned, record)
    if out is not None:
        show_note(f"saved in {out}")


def _measure(
    resolved: ResolvedModel,
    pruned: Pruned,
    test: Images | None,
    batch_size: int,
    device: str,
    advance: Advance,
) -> dict[str, Any]:
    """Measure accuracy before and after; empty without data."""
    from intrafuse.study.evaluate import accuracy

    if test is None:
        return {}
    figures: dict[str, Any] = {"data": test.name, "images": len(test)}
    networks = {"accuracy_before": resolved.model, "accuracy": pruned.model}
    for name, network in networks.items():
        bar = partial(advance, name.replace("_", " "))
        figures[name] = accuracy(network, test, batch_size=batch_size, device=device, progress=bar)
    return figures


def _save(
    out: Path,
    pruned: Pruned,
    model: ModelOptions,
    resolved: ResolvedModel,
    figures: dict[str, Any],
    settings: Settings,
) -> None:
    from intrafuse.catalog.zoo import file_sha256
    from intrafuse.checkpoint.folder import save

    save(
        out,
        pruned,
        architecture=model.model,
        arguments=resolved.arguments,
        source_sha256=None if model.weights is None else file_sha256(model.weights),
        figures=figures,
        recipe=settings.as_data(),
    )


def _show(common: Common, pruned: Pruned, record: dict[str, Any]) -> None:
    from intrafuse.study.report.kinds.pruning import sizes

    table, report = sizes(record), pruned.report
    title = f"Pruned by {record['method']['name']} in {report.seconds:.2f} s"
    show_table(common, title, table.header, table.texts, table.numbers)
    header, rows = report.choices()
    if rows:
        show_table(common, "Choices", header, rows, numbers=(2,))
    for remark in report.remarks():
        show_note(remark)


def _data(
    resolved: ResolvedModel, pruned: Pruned, figures: dict[str, Any], out: Path | None
) -> dict[str, Any]:
    from intrafuse.allocation.timing import latencies

    networks = {"before": resolved.model, "after": pruned.model}
    took = pruned.report.latency or latencies(networks, resolved.example_inputs, runs=RUNS)
    return {
        **pruned.plan.as_data(),
        "latency": {name: asdict(one) for name, one in took.items()},
        "seconds": pruned.report.seconds,
        "check": None if pruned.report.check is None else asdict(pruned.report.check),
        "unclear": list(pruned.report.unclear),
        "figures": figures,
        "out": None if out is None else str(out),
    }
