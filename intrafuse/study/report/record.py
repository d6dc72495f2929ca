"""Records: the JSON files that commands write, with their kind and command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intrafuse.support.files import replacing
from intrafuse.support.version import __version__

__all__ = ["Record", "as_record", "write_record"]

Record = Mapping[str, Any]


def as_record(kind: str, data: Record, *, command: str = "") -> dict[str, Any]:
    """Make a record: figures with their kind, version and command.

    Args:
        kind: kind of the figures, such as `comparison`; each kind has a file in `report/kinds`.
        data: the figures as JSON data.
        command: the command line that reproduces them.

    >>> as_record("cost", {"rows": []}, command="intrafuse cost mlp")["kind"]
    'cost'
    """
    return {"kind": kind, "version": __version__, "command": command, **data}


def write_record(path: Path, record: Record) -> None:
    """Write a record to a file atomically."""
    text = json.dumps(record, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
