"""Prune a checkpoint that is larger than memory: tensors are read and written one by one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from torch import Tensor

from intrafuse.allocation.budget import Figures, measure
from intrafuse.checkpoint.cluster import planned_by_ray, require_independent
from intrafuse.checkpoint.manifest import MANIFEST
from intrafuse.checkpoint.scratch import SCRATCH, Scratch
from intrafuse.checkpoint.source import Source
from intrafuse.checkpoint.written import Output, parse_size
from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.methods import Method
from intrafuse.moments.sources import MomentSource
from intrafuse.pruning.each_group import merging
from intrafuse.pruning.plan import as_data
from intrafuse.pruning.prepare import Prepared, describe
from intrafuse.pruning.result import Report
from intrafuse.pruning.settings import Arguments, Settings, takes_settings
from intrafuse.support.arguments import check_arguments, check_choice
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import folder_target, locked, sweep
from intrafuse.support.version import __version__
from intrafuse.surgery.weights import Weights

__all__ = ["Streamed", "prune_checkpoint"]

# Metrics that read only weights; the others run the model.
IMPORTANCE = ("l1", "l2", "linf", "random", "lamp", "fpgm")
Workers = Literal["none", "ray"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Streamed:
    """What `prune_checkpoint` returns.

    Attributes:
        folder: the folder of the pruned checkpoint.
        graph: the channel graph.
        settings: method, importance, budget and seed, as JSON data.
        widths: number of channels that each prunable group keeps, by group name.
        report: requested and achieved sizes; its time counts all runs that were needed.
        pretrained: whether `from_pretrained` builds the pruned network from its configuration;
            otherwise only `intrafuse.load` restores it.
    """

    folder: Path
    graph: ChannelGraph
    settings: Mapping[str, Any]
    widths: Mapping[str, int]
    report: Report
    pretrained: bool

    @property
    def before(self) -> Figures:
        """The size of the network before."""
        return self.report.before

    @property
    def after(self) -> Figures:
        """The size of the pruned network."""
        return self.report.after

    @property
    def removed(self) -> Mapping[str, float]:
        """Removed share of channels, params and macs, in [0, 1]."""
        return self.report.reached

    @property
    def notes(self) -> Mapping[str, Mapping[str, Any]]:
        """The method's notes on its choices, by group name."""
        return self.report.notes

    @property
    def seconds(self) -> float:
        """The time that it took."""
        return self.report.seconds

    def as_data(self) -> dict[str, Any]:
        """Return settings, sizes and widths as JSON data, as `Plan.as_data` does."""
        return as_data(self)


@takes_settings
@apart
def prune_checkpoint(
    folder: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    shard_size: str | int = "1GB",
    workers: Workers = "none",
    address: str | None = None,
    progress: Progress | None = None,
    **arguments: Unpack[Arguments],
) -> Streamed:
    """Prune a checkpoint of transformers that may be larger than memory.

    The model is built without its parameters. One group after the other is read, merged and
    written, so memory holds the tensors of one group. The result is the same, bit for bit, as that
    of `prune`. If the run is killed, the same call goes on where it was, and loses at most the
    group or the shard in hand. Use `prune` where the model fits into memory: it also checks its
    result, and takes metrics and repairs that run the model.

    Args:
        folder: a folder that `save_pretrained` wrote, with one safetensors file or several shards.
            It is only read.
        out: the folder to write: a new or empty one, or that of an interrupted run of the same
            call.
        settings: how to prune.
        shard_size: most bytes of an output file, such as "500MB"; a larger tensor has its own.
        workers: `ray` plans groups as tasks of a Ray cluster that reads the checkpoint at the same
            path, with `select` and `intra-fusion`, whose maps do not depend on each other.
        address: address of the cluster. None uses the running Ray, or starts it on this machine.
        progress: called with (step, done, all); the steps are `scoring`, `merging` (one group, so
            about two for each layer) and `writing`.
        arguments: fields of `Settings`; they override those of `settings`.

    Returns:
        Widths, sizes before and after, and time.

    Raises:
        IntrafuseError: the checkpoint cannot be read or does not fit its configuration, the
            settings need data or outputs of the model, or `out` holds other files.

    >>> prune_checkpoint("no/such/folder", "small", channels=0.5)
    Traceback (most recent call last):
    intrafuse.support.errors.IntrafuseError: a checkpoint is a folder...
    """
    started = time.perf_counter()
    asked = Settings.of(settings, arguments)
    check_arguments(folder=folder, progress=progress)
    most = parse_size(shard_size)
    check_choice("workers", workers, Workers)
    _require_weights_only(asked)
    if workers == "ray":
        require_independent(asked)
    source = Source.of(Path(folder).expanduser().resolve())
    out = _usable(out, source.folder)
    with locked(out / SCRATCH):
        scratch = Scratch.open(out, _digest(asked, source, most), started)
        run = _Run(asked, source, scratch, progress or _silent, workers, address)
        try:
            weights = run.merge()
        except IntrafuseError:
            if scratch.journal.widths is None:  # refused, with nothing merged: leave nothing
                scratch.remove()
                with suppress(OSError):
                    out.rmdir()
            raise
        return run.write(Output(out, source, weights, scratch, most))


@dataclass(eq=False)
class _Run:
    """One run of `prune_checkpoint`.

    Attributes:
        asked: the settings.
        source: the checkpoint.
        scratch: what was done before, and what this run does.
        progress: called with (step, done, all).
        workers, address: as for `prune_checkpoint`.
    """

    asked: Settings
    source: Source
    scratch: Scratch
    progress: Progress
    workers: Workers
    address: str | None

    def merge(self) -> Weights:
        """Merge the groups that are not merged yet."""
        asked, scratch = self.asked, self.scratch
        ready = self.source.prepared(asked, scratch.keep, partial(self.progress, "merging"))
        weights, self.before = ready.context.weights, ready.before
        scratch.flush()  # batch norm that was folded
        scores = self._scores(ready)
        if scratch.journal.widths is None:
            scratch.note(widths=ready.widths(scores)[0])
        widths = scratch.journal.widths or {}
        scratch.resume(weights)
        repair = "analytic" if asked.repair == "analytic" else None
        merged = scratch.journal.merged
        left = [group for group in ready.groups if group.name not in merged]
        with self._method(left, scores, widths) as method:
            for merge_map in merging(
                method, ready.groups, scores, widths, ready.context, repair=repair, merged=merged
            ):
                scratch.note_group(merge_map.group, merge_map.note, weights)
                del merge_map  # its matrices may be large
        return weights

    def _method(
        self,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        widths: Mapping[str, int],
    ) -> AbstractContextManager[Method]:
        """Return the method, or one that waits for the maps of a cluster."""
        if self.workers == "none":
            return nullcontext(self.asked.compression)
        folder = self.source.folder
        return planned_by_ray(self.asked, folder, groups, scores, widths, self.address)

    def _scores(self, ready: Prepared) -> dict[str, Tensor]:
        """Score the groups that are not scored yet."""

        def note(found: Mapping[str, Tensor]) -> None:
            self.scratch.note_scores(found)
            self.progress("scoring", len(found), len(ready.groups))

        return ready.scores(self.scratch.scores(), note)

    def write(self, output: Output) -> Streamed:
        """Write the shards and everything else, and remove the scratch files."""
        graph, weights = output.weights.graph, output.weights
        output.write_shards(partial(self.progress, "writing"))
        pretrained = output.write_configuration()
        after = measure(graph, weights.sizes, weights.counted())
        seconds = self.scratch.seconds
        report = Report(
            wanted={self.asked.wanted.kind: self.asked.wanted.share},
            reached=after.removed(self.before),
            before=self.before,
            after=after,
            seconds=seconds,
            notes=self.scratch.journal.notes,
            unclear=graph.unclear(weights.sizes),
        )
        widths = {group.name: weights.sizes[group.id] for group in graph.groups}
        settings = describe(self.asked)
        made = Streamed(output.folder, graph, settings, widths, report, pretrained)
        named = isinstance(self.asked.importance, str)
        output.write_manifest(made, seconds, self.asked.as_data() if named else None)
        self.scratch.remove()
        return made


def _silent(step: str, done: int, total: int) -> None:
    pass


def _digest(asked: Settings, source: Source, most: int) -> str:
    """Return a digest of everything that decides the output."""
    told = [
        json.dumps(describe(asked), sort_keys=True, default=repr),
        source.digest,
        most,
        __version__,
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _usable(out: str | Path, source: Path) -> Path:
    """Return the folder that may be written; refuse one with files of others."""
    check_arguments(folder=out)
    out = folder_target(out)
    if out == source or source in out.parents:
        raise IntrafuseError("a checkpoint is not pruned in place", value=str(out), usage=True)
    sweep(out)
    if out.is_dir() and not (out / SCRATCH).is_dir():
        names = sorted(path.name for path in out.iterdir())
        if names:
            what = "a network" if MANIFEST in names else "other files"
            raise IntrafuseError(
                f"the folder holds {what} ({', '.join(names[:3])})",
                value=str(out),
                remedy="choose a new folder",
            )
    return out


def _require_weights_only(asked: Settings) -> None:
    """Refuse settings that need data, or a model that runs."""
    method = asked.compression
    source = method.source if isinstance(method, MomentSource) else "analytic"
    needs = {
        f"repair {asked.repair!r}": asked.repair not in (None, "analytic"),
        "a latency budget": asked.wanted.kind == "latency",
        f"importance {asked.importance!r}": isinstance(asked.importance, str)
        and asked.importance not in IMPORTANCE,
        f"source {source!r}": source != "analytic",
        f"method {method.name!r}": not isinstance(method, MomentSource)
        and type(method).solved is not Method.solved,
    }
    named = [what for what, needed in needs.items() if needed]
    if named:
        raise IntrafuseError(
            "streaming reads only weights, but "
            f"{' and '.join(named)} would run the model or need data",
            usage=True,
            remedy=f"use intrafuse.prune, or an importance of {', '.join(IMPORTANCE)}",
        )
