"""Records: the JSON files that commands write, which say what they hold and how it was made."""

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
    """Say of some figures what they are.

    Args:
        kind: what they show, such as `comparison`, with a file of its own in `report/kinds`.
        data: the figures, as JSON data.
        command: what to type to have them again.

    >>> as_record("cost", {"rows": []}, command="intrafuse cost mlp")["kind"]
    'cost'
    """
    return {"kind": kind, "version": __version__, "command": command, **data}


def write_record(path: Path, record: Record) -> None:
    """Write a record to a file, as a whole or not at all."""
    text = json.dumps(record, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
