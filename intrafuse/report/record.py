"""Records: the JSON files that commands write, which say what they hold and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import intrafuse
from intrafuse.files import replacing

__all__ = ["as_record", "write_record"]


def as_record(kind: str, data: Mapping[str, Any], *, command: str = "") -> dict[str, Any]:
    """Say of some figures what they are.

    Args:
        kind: what they show, such as `comparison`; `intrafuse.report.kinds` knows how to draw it.
        data: the figures, as JSON data.
        command: what to type to have them again.

    >>> as_record("cost", {"rows": []}, command="intrafuse cost mlp")["kind"]
    'cost'
    """
    return {"kind": kind, "version": intrafuse.__version__, "command": command, **data}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record to a file, as a whole or not at all."""
    text = json.dumps(record, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
