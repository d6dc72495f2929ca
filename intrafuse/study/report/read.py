"""Find the records in folders: JSON files of commands, and saved networks."""

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

RESULT = "result.json"  # of a factorized run: it also describes the stages in subfolders
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Entry:
    """A record with its source file, tables and pictures."""

    kind: str
    source: Path
    record: Mapping[str, Any]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        """The name of its file; the name of its folder if all such files have the same name."""
        source = self.source
        whole = source.name not in (MANIFEST, RESULT)
        return printable(source.stem if whole else source.resolve().parent.name)

    @property
    def recipe(self) -> str:
        """How to reproduce the record: the command or the settings."""
        settings = self.record.get("recipe") or self.record.get("settings")
        return self.record.get("command") or json.dumps(settings, indent=1)


def read_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Read all records in folders, in the order of a page.

    Args:
        paths: folders, which are searched recursively, or single files.

    Raises:
        IntrafuseError: a path does not exist, cannot be read or holds no record, or a record is
            broken.
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
    """Read all records below paths, each file once."""
    found: dict[Path, Entry] = {}
    for path in map(Path, paths):
        known = len(found)
        for source, record in _records(path):
            found.setdefault(source.resolve(), _entry(source, record))
        if len(found) == known and not any(_within(entry, path) for entry in found):
            raise IntrafuseError(
                "a report needs records, but there are none here",
                value=str(path),
                remedy="write records with --json FILE, or name a folder of intrafuse prune --out",
            )
    return found


def _saved_by(entry: Entry) -> Iterator[Path]:
    """List the places where the saved network of a record may be, so that it is not shown twice.

    The record holds the folder as the user typed it, relative to the working folder at that time,
    which may be any parent folder.
    """
    out = entry.record.get("out")
    if isinstance(out, str) and out and "\0" not in out:
        for folder in (Path.cwd(), *entry.source.resolve().parents):
            yield Path(os.path.realpath(folder / out / MANIFEST))  # also resolves circular links


def _within(source: Path, path: Path) -> bool:
    return source.is_relative_to(path.resolve())


def _records(path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if path.is_file():
        record = _read(path)
        if record is None:
            raise IntrafuseError(
                "the file is not a record that a report can show",
                value=str(path),
                remedy=f"name a file that --json wrote; kinds are {', '.join(KINDS)}",
            )
        yield path, record
    elif not path.is_dir():
        raise IntrafuseError("no such file or folder", value=str(path), usage=True)
    else:
        yield from _below(path, set())


def _below(folder: Path, known: set[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Find the records in a folder and its subfolders, each folder once despite links."""
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
    """Read a record; None if the file is something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise IntrafuseError(
            f"a file is not readable JSON ({error})", value=str(path), remedy="write it again"
        ) from error
    known = isinstance(found, dict) and isinstance(found.get("kind"), str)
    return found if known and found["kind"] in KINDS else None


def _saved(folder: Path) -> dict[str, Any]:
    """Describe a saved pruned network with the fields of a record of `intrafuse prune`."""
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
    """Escape control characters in all strings of a record."""
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, Mapping):
        return {_shown(key): _shown(value) for key, value in data.items()}
    return [_shown(value) for value in data] if isinstance(data, list | tuple) else data


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turn an error inside, caused by a malformed record, into an IntrafuseError with the file.

    Raises:
        IntrafuseError: the record is malformed. Other IntrafuseErrors pass unchanged.
    """
    try:
        yield
    except IntrafuseError:
        raise
    except BROKEN as error:
        raise IntrafuseError(
            f"a record does not have the fields of its kind ({type(error).__name__}: {error})",
            value=str(source),
            remedy="write it again with this version of intrafuse",
        ) from error
