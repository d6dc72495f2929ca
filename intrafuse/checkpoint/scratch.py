"""What a streamed pruning has done so far: changed tensors in scratch files, and a journal.

    OUT/.stream/journal.json        written last after each group, so it names only whole files
    OUT/.stream/scores.safetensors  the scores of the groups that are scored
    OUT/.stream/00001.safetensors   the tensors that a group changed, and statistics of layers

A kill loses at most what the journal does not name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, ValidationError
from torch import Tensor

from intrafuse.checkpoint.manifest import Data, Stored
from intrafuse.checkpoint.stored import StoredTensor, bytes_of, tensors_of, write_tensors
from intrafuse.checkpoint.tensors import dtype_name, memory_order
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import remove_folder, replacing
from intrafuse.support.reading import read_text
from intrafuse.surgery.handles import require_finite
from intrafuse.surgery.weights import Statistics, Weights

__all__ = ["SCRATCH", "Journal", "Kept", "Scratch"]

SCRATCH, JOURNAL, SCORES = ".stream", "journal.json", "scores.safetensors"
MOST = 2**30  # bytes of changed tensors that wait for their file, within one group
MEAN, SPREAD = "mean/", "spread/"  # prefixes of statistics in a file


class Place(Data):
    """Where a changed tensor lies."""

    file: str
    tensor: Stored


class Journal(Data):
    """What is done.

    Attributes:
        digest: of the settings and of the source.
        widths: channels that groups will keep, by name; None until all groups are scored.
        merged: the groups that are merged.
        notes: the method's notes on them.
        places: where the changed tensors lie, by name.
        statistics: the file with the statistics of layers.
        shards: SHA-256 of the finished files of the output, by name.
        seconds: time that it took so far.
    """

    digest: str
    widths: dict[str, int] | None = None
    merged: tuple[str, ...] = ()
    notes: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    places: dict[str, Place] = Field(default_factory=dict)
    statistics: str | None = None
    shards: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def files(self) -> set[str]:
        """The scratch files that it names."""
        named = {place.file for place in self.places.values()}
        return {name for name in (*named, self.statistics) if name is not None}


class Kept:
    """A changed tensor, in memory until it has its place in a file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._stored: StoredTensor | None = None
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.dtype, self.order = tensor.dtype, memory_order(tensor)

    def numel(self) -> int:
        """Return the number of its elements."""
        return torch.Size(self.shape).numel()

    def load(self) -> Tensor:
        """Return the tensor, from memory or from its file."""
        if self._tensor is not None:
            return self._tensor
        assert self._stored is not None
        return self._stored.load()

    def move(self, stored: StoredTensor) -> None:
        """Let go of the tensor, which now lies in a file."""
        self._tensor, self._stored = None, stored


class Scratch:
    """The changed tensors of one run, and its journal.

    Args:
        out: the folder of the output.
        journal: what was done before.
        started: when the run began, by `time.perf_counter`.
    """

    def __init__(self, out: Path, journal: Journal, started: float) -> None:
        self.folder = out / SCRATCH
        self._started = started - journal.seconds
        self.journal = journal
        self._waiting: dict[str, Kept] = {}
        self._places = dict(journal.places)
        self._number = max([0, *(int(Path(name).stem) for name in journal.files)])

    @classmethod
    def open(cls, out: Path, digest: str, started: float) -> Scratch:
        """Go on where the journal ends, or begin.

        Raises:
            IntrafuseError: the journal belongs to another command, or cannot be read.
        """
        path = out / SCRATCH / JOURNAL
        journal = Journal(digest=digest)
        if path.exists():
            try:
                journal = Journal.model_validate_json(read_text(path))
            except (OSError, ValueError, ValidationError) as error:
                raise IntrafuseError(
                    "the journal of an interrupted run cannot be read",
                    value=str(path),
                    remedy=f"delete {out}, and start again",
                ) from error
        if journal.digest != digest:
            raise IntrafuseError(
                "an interrupted run of another command, or of a source that has changed since, "
                "left its work here",
                value=str(out),
                remedy="repeat that command to go on, or choose a new folder",
            )
        scratch = cls(out, journal, started)
        stays = journal.files | ({SCORES} if path.exists() else set())
        for file in scratch.folder.glob("*.safetensors"):
            if file.name not in stays:
                file.unlink()
        if not path.exists():
            scratch.note()  # from here on, what lies here belongs to this command
        return scratch

    @property
    def seconds(self) -> float:
        """The time of this run and of those before."""
        return time.perf_counter() - self._started

    def keep(self, name: str, tensor: Tensor) -> Kept:
        """Take a changed tensor; when many wait, write them to a file."""
        self._waiting[name] = kept = Kept(tensor)
        if sum(map(bytes_of, self._waiting.values())) > MOST:
            self.flush()
        return kept

    def flush(self, more: Mapping[str, Tensor] | None = None) -> str | None:
        """Write the waiting tensors to a file; return its name, or None if there are none.

        Raises:
            IntrafuseError: a tensor is not finite, or the file cannot be written.
        """
        if not self._waiting and not more:
            return None
        self._number += 1
        path = self.folder / f"{self._number:05d}.safetensors"
        for name, kept in self._waiting.items():
            require_finite(name, kept.load(), infinite=False)
        write_tensors(path, {**self._waiting, **(more or {})})
        for name, kept in self._waiting.items():
            kept.move(StoredTensor(path, name, kept.shape, kept.dtype, kept.order))
            stored = Stored(shape=kept.shape, dtype=dtype_name(kept), order=kept.order)
            self._places[name] = Place(file=path.name, tensor=stored)
        self._waiting.clear()
        return path.name

    # -- journal ---------------------------------------------------------------------------------

    def note(self, **fields: Any) -> None:
        """Write the journal with changed fields, atomically."""
        self.journal = self.journal.model_copy(update={**fields, "seconds": self.seconds})
        with replacing(self.folder / JOURNAL) as temporary:
            temporary.write_text(self.journal.model_dump_json(), "utf-8")

    def note_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Store the scores of the groups that are scored."""
        write_tensors(self.folder / SCORES, scores)

    def scores(self) -> dict[str, Tensor]:
        """Read the scores of the groups that are scored."""
        path = self.folder / SCORES
        return {k: t.load() for k, t in tensors_of(path).items()} if path.exists() else {}

    def note_group(self, group: str, note: Mapping[str, Any], weights: Weights) -> None:
        """Write what a merged group has changed, and note it."""
        known = weights.statistics
        told = {f"{MEAN}{name}": mean for name, (mean, _) in known.items()}
        told |= {f"{SPREAD}{name}": spread for name, (_, spread) in known.items()}
        file = self.flush(told)
        notes = {**self.journal.notes, **({group: dict(note)} if note else {})}
        self.note(
            merged=(*self.journal.merged, group),
            notes=notes,
            places=dict(self._places),
            statistics=file if told else None,
        )

    def resume(self, weights: Weights) -> None:
        """Give weights what earlier runs have changed."""
        journal = self.journal
        if not journal.merged:
            return
        held = {
            name: StoredTensor(
                self.folder / place.file,
                name,
                place.tensor.shape,
                getattr(torch, place.tensor.dtype),
                place.tensor.order,
            )
            for name, place in journal.places.items()
        }
        widths = {name: (journal.widths or {})[name] for name in journal.merged}
        statistics: dict[str, Statistics] = {}
        if journal.statistics is not None:
            told = tensors_of(self.folder / journal.statistics)
            names = [name.removeprefix(MEAN) for name in told if name.startswith(MEAN)]
            statistics = {n: (told[MEAN + n].load(), told[SPREAD + n].load()) for n in names}
        weights.resume(held, widths, statistics)
        self._places = dict(journal.places)

    def remove(self) -> None:
        """Remove the scratch files and the journal, all at once."""
        remove_folder(self.folder)
