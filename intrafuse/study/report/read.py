"""Find the records in folders: JSON files that commands wrote, and networks that were saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrafuse.checkpoint.folder import MANIFEST, PLAN
from intrafuse.checkpoint.manifest import Manifest
from intrafuse.pruning.plan import Plan
from intrafuse.study.report.kinds import KINDS
from intrafuse.study.report.pictures import Picture
from intrafuse.support.errors import IntrafuseError, printable
from intrafuse.support.reading import read_json
from intrafuse.support.tables import Table

__all__ = ["Entry", "read_entries", "reading"]

RESULT = "result.json"  # of a factorised run: its stages lie below it, and are told by it
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Entry:
    """A record, where it was found, and what it gives."""

    kind: str
    source: Path
    record: Mapping[str, Any]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        """Tell it from others of its kind: by its file, or its folder where all files are alike."""
        source = self.source
        whole = source.name not in (MANIFEST, RESULT)
        return printable(source.stem if whole else source.resolve().parent.name)

    @property
    def recipe(self) -> str:
        """How to have it again: the command, or the settings."""
        settings = self.record.get("recipe") or self.record.get("settings")
        return self.record.get("command") or json.dumps(settings, indent=1)


def read_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Read all records in some folders, in the order of a page.

    Args:
        paths: folders, searched with all that is in them, or single files.

    Raises:
        IntrafuseError: a path that does not exist, cannot be read or holds no record; a record
            that is broken.
    """
    try:
        found = _found(paths)
    except OSError as error:
        raise IntrafuseError(
            f"a folder of records cannot be read: {error.strerror}", value=str(error.filename)
        ) from error
    order = list(KINDS)
    saved = {place for entry in found.values() for place in _saved_by(entry)}
    kept = [entry for source, entry in found.items() if source not in saved]
    return sorted(kept, key=lambda entry: (order.index(entry.kind), str(entry.source)))


def _found(paths: Sequence[str | Path]) -> dict[Path, Entry]:
    """Read what is below some paths, each file once."""
    found: dict[Path, Entry] = {}
    for path in map(Path, paths):
        known = len(found)
        for source, record in _records(path):
            found.setdefault(source.resolve(), _entry(source, record))
        if len(found) == known and not any(_within(entry, path) for entry in found):
            raise IntrafuseError(
                "a report needs records, and here is none",
                value=str(path),
                remedy="write some with --json FILE, or give what intrafuse prune --out saved",
            )
    return found


def _saved_by(entry: Entry) -> Iterator[Path]:
    """List where the network of a record may lie, so that it is not shown twice.

    Its folder is written as it was typed: below the folder of then, which may be any above.
    """
    out = entry.record.get("out")
    if isinstance(out, str) and out and "\0" not in out:
        for folder in (Path.cwd(), *entry.source.resolve().parents):
            yield Path(os.path.realpath(folder / out / MANIFEST))  # links may lead in circles


def _within(source: Path, path: Path) -> bool:
    return source.is_relative_to(path.resolve())


def _records(path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if path.is_file():
        record = _read(path)
        if record is None:
            raise IntrafuseError(
                "no record of a kind that a report shows",
                value=str(path),
                remedy=f"give what --json wrote; kinds are {', '.join(KINDS)}",
            )
        yield path, record
    elif not path.is_dir():
        raise IntrafuseError("no such file or folder", value=str(path), usage=True)
    else:
        yield from _below(path, set())


def _below(folder: Path, known: set[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Find the records in a folder and below, once where links lead to it again."""
    if folder.resolve() in known:
        return
    known.add(folder.resolve())
    if (folder / MANIFEST).exists() and (folder / PLAN).exists():
        yield folder / MANIFEST, _saved(folder)
    for path in sorted(folder.glob("*.json")):
        record = _read(path) if path.is_file() else None
        if record is not None:
            yield path, record
    if (folder / MANIFEST).exists() or (folder / RESULT).exists():
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _below(inner, known)


def _read(path: Path) -> Mapping[str, Any] | None:
    """Read a record, or nothing where the file is something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise IntrafuseError(
            f"a file is no readable JSON ({error})", value=str(path), remedy="write it again"
        ) from error
    known = isinstance(found, dict) and isinstance(found.get("kind"), str)
    return found if known and found["kind"] in KINDS else None


def _saved(folder: Path) -> dict[str, Any]:
    """Describe a network that was pruned and saved as `intrafuse prune` does."""
    manifest, plan = Manifest.read(folder / MANIFEST), Plan.load(folder / PLAN)
    return {
        "kind": "pruning",
        "version": manifest.versions.get("intrafuse"),
        "model": manifest.architecture or "a network",
        **plan.as_data(),
        "settings": dict(plan.settings),
        "figures": dict(manifest.figures),
        "weights_sha256": manifest.source_sha256,
    }


def _entry(source: Path, record: Mapping[str, Any]) -> Entry:
    kind = KINDS[record["kind"]]
    with reading(source):
        record = _shown(record)
        tables, pictures = kind.tables(record), kind.pictures(record)
        _ = [table.texts for table in tables]  # every value can be written
        return Entry(record["kind"], source, record, tuple(tables), tuple(pictures))


def _shown(data: Any) -> Any:
    """Write names in a record as any file, font and terminal can take them."""
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, Mapping):
        return {_shown(key): _shown(value) for key, value in data.items()}
    return [_shown(value) for value in data] if isinstance(data, list | tuple) else data


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Say of a record that is not what its kind should be which file it is.

    Raises:
        IntrafuseError: whatever goes wrong inside for that reason; its own errors pass.
    """
    try:
        yield
    except IntrafuseError:
        raise
    except BROKEN as error:
        raise IntrafuseError(
            f"a record lacks what its kind has ({type(error).__name__}: {error})",
            value=str(source),
            remedy="write it again with this version of intrafuse",
        ) from error
