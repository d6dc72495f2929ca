"""`intrafuse prune`: make a network smaller and save it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from intrafuse.cli.options import RANDOM, Common, DataOptions, ModelOptions, PruneOptions
from intrafuse.cli.output import Advance, progress, show_note, show_table, write_json
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.catalog.data import Images
    from intrafuse.catalog.zoo import ResolvedModel
    from intrafuse.methods import Method
    from intrafuse.pruning.prune import Pruned

__all__ = ["prune"]

RUNS = 10  # calls that are timed to state the latency


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Choose a method; its settings are the fields of its class in `intrafuse.methods`."""

    method: Annotated[str, typer.Option(help="Method; an unknown one lists all.")] = "intra-fusion"
    features: Annotated[
        str | None,
        typer.Option(help="What is compared: writers or all; for folding also balanced, plain."),
    ] = None
    target: Annotated[str | None, typer.Option(help="important, k-means or mixture.")] = None
    source_marginal: Annotated[str | None, typer.Option(help="uniform, importance or softmax.")] = (
        None
    )
    target_marginal: Annotated[str | None, typer.Option(help="uniform, importance or softmax.")] = (
        None
    )
    p: Annotated[float | None, typer.Option(help="Order of the norm of the ground cost.")] = None
    regularisation: Annotated[
        float | None, typer.Option(min=0, help="0 is exact, above 0 entropic; by default by size.")
    ] = None
    normalisation: Annotated[str | None, typer.Option(help="paper, barycentric or projected.")] = (
        None
    )
    correction: Annotated[
        str | None, typer.Option(help="Variance of folded channels: approximate or none.")
    ] = None
    source: Annotated[
        str | None, typer.Option(help="Moments: analytic, synthetic, or calibration on --data.")
    ] = None
    transport: Annotated[
        str | None, typer.Option(help="What moment merges by: folding, intra-fusion or none.")
    ] = None
    choice: Annotated[
        str | None, typer.Option(help="What moment keeps or fuses into: greedy or importance.")
    ] = None
    ridge: Annotated[float | None, typer.Option(min=0, help="Ridge of the readout.")] = None
    max_gain: Annotated[float | None, typer.Option(min=0, help="Largest gain; 0: no gains.")] = None
    length: Annotated[
        float | None, typer.Option(min=0, help="Reach of correlation between positions.")
    ] = None
    images: Annotated[
        int | None, typer.Option(min=1, help="Synthetic inputs (--source synthetic).")
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps that optimise synthetic inputs.")
    ] = None
    start: Annotated[str | None, typer.Option(help="Start of clusters: ward or k-means++.")] = None

    def build(self) -> Method:
        """Make the method with its settings.

        Raises:
            IntrafuseError: a setting that the method does not have, or not with this value.
        """
        from intrafuse.methods import METHODS, resolve_method

        kind: Any = type(resolve_method(self.method))
        given = {key: value for key, value in asdict(self).items() if value is not None}
        del given["method"]
        known = get_type_hints(kind)
        for name, value in given.items():
            option = f"--{name.replace('_', '-')}"
            if name not in known:
                having = [n for n, m in METHODS.items() if name in get_type_hints(m)]
                raise IntrafuseError(
                    f"{self.method} has no setting {option}",
                    value=value,
                    remedy=f"it belongs to {', '.join(having)}",
                    usage=True,
                )
            choices = get_args(known[name]) if get_origin(known[name]) is Literal else (value,)
            if value not in choices:
                raise IntrafuseError(
                    f"{option} must be one of {', '.join(choices)}", value=value, usage=True
                )
        return kind(**given)


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Say how much to remove, of exactly one thing."""

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
        float | None, typer.Option(metavar="SHARE", help="Share of a call's time to remove.")
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
        bool, typer.Option(help="Run the result, and its widths against the original.")
    ] = True,
    common: Common = Common(),
) -> None:
    """Make a network smaller, and save it."""
    settings = options.settings()
    common.start()
    import intrafuse
    from intrafuse.checkpoint.folder import usable

    chosen = method.build()
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
            **asdict(budget),
            method=chosen,
            data=data.batches(data.data, common),
            seed=common.seed,
            check=check,
            progress=partial(advance, "planning"),
            **settings,
        )
        figures = _measure(resolved, pruned, test, data.batch_size, common.device, advance)
    if out is not None:
        _save(out, pruned, model, resolved, figures)
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
    """Measure accuracy before and after, where there is data."""
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
    out: Path, pruned: Pruned, model: ModelOptions, resolved: ResolvedModel, figures: dict[str, Any]
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
