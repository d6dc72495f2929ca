"""`intrafuse prune --stream`: prune a checkpoint that is larger than memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.options import Common, DataOptions, ModelOptions
from intrafuse.cli.output import progress, show_note, show_table, write_json
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.checkpoint.stream import Streamed
    from intrafuse.pruning.settings import Settings

__all__ = ["StreamOptions", "stream"]

HUB, SHARD = "hf:", "1GB"


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Options of streaming."""

    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read and write hf:FOLDER tensor by tensor, also if it exceeds the memory; "
            "the same command continues an interrupted run.",
        ),
    ] = False
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help=f"Largest file that --stream writes; {SHARD}."),
    ] = None

    workers: Annotated[
        str | None,
        typer.Option(help="With --stream: ray plans groups on a cluster (select, intra-fusion)."),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(help="With --workers ray: the cluster; default: a running one, or a new one."),
    ] = None

    def require_use(self) -> None:
        """Refuse other options without --stream."""
        for name in ("shard_size", "workers", "address"):
            value = getattr(self, name)
            if value is not None and not self.stream:
                option = name.replace("_", "-")
                raise IntrafuseError(f"--{option} needs --stream", value=value, usage=True)


def stream(
    model: ModelOptions,
    settings: Settings,
    options: StreamOptions,
    data: DataOptions,
    out: Path | None,
    common: Common,
) -> None:
    """Prune a checkpoint by streaming, and show the figures."""
    import intrafuse

    _require_folder(model, data, out, common)
    assert out is not None
    with progress() as advance:
        made = intrafuse.prune_checkpoint(
            model.model.removeprefix(HUB),
            out,
            settings,
            shard_size=options.shard_size or SHARD,
            workers=options.workers or "none",  # type: ignore[arg-type]
            address=options.address,
            progress=advance,
        )
    record = {**model.record(), **_data(made)}
    write_json(common, "pruning", record)
    _show(common, made, record)


def _require_folder(
    model: ModelOptions, data: DataOptions, out: Path | None, common: Common
) -> None:
    """Refuse what streaming cannot take."""
    refused = {
        "a model other than hf:FOLDER": not model.model.startswith(HUB),
        "--weights": model.weights is not None,
        "--num-classes": model.num_classes is not None,
        "--input-shape": model.input_shape is not None,
        "--data": data.data is not None,
        "a device other than cpu": common.device != "cpu",
    }
    named = [what for what, given in refused.items() if given]
    if named or out is None:
        wrong = f"does not take {' or '.join(named)}" if named else "needs --out DIR"
        raise IntrafuseError(
            f"--stream {wrong}",
            usage=True,
            remedy="intrafuse prune hf:FOLDER --stream --out DIR",
        )


def _data(made: Streamed) -> dict[str, Any]:
    return {
        **made.as_data(),
        "latency": {},
        "check": None,
        "unclear": list(made.report.unclear),
        "figures": {},
        "out": str(made.folder),
    }


def _show(common: Common, made: Streamed, record: dict[str, Any]) -> None:
    from intrafuse.study.report.kinds.pruning import sizes

    table = sizes(record)
    title = f"Pruned by {record['method']['name']} in {made.seconds:.2f} s"
    show_table(common, title, table.header, table.texts, table.numbers)
    for remark in made.report.remarks():
        show_note(remark)
    if not made.pretrained:
        show_note(
            "note: the configuration cannot say these sizes: intrafuse.load restores the network, "
            "from_pretrained does not"
        )
    show_note(f"saved in {made.folder}")
