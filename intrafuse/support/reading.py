"""Read untrusted files: only regular files, of limited size and nesting depth."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

__all__ = [
    "MOST_BYTES",
    "MOST_LEVELS",
    "parse_json",
    "read_json",
    "read_text",
    "require_file",
    "require_shallow",
]

MOST_BYTES = 64 * 2**20  # largest text file; a manifest of 10,000 tensors has 2 MB
MOST_LEVELS = 100  # deepest nesting of lists and mappings


def require_file(path: str | Path) -> None:
    """Refuse anything except a regular file. Opening a FIFO would wait for a writer, maybe forever.

    Raises:
        OSError: the file does not exist, or is a folder, a FIFO, a socket or a device.
    """
    try:
        mode = Path(path).stat().st_mode
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, f"no name of a file: {error}", repr(path)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """Read a regular UTF-8 text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger than `most` bytes, or is not UTF-8.
    """
    require_file(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON data from a regular file, with the checks of `parse_json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, or `parse_json` refuses it.
    """
    return parse_json(read_text(path))


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """Parse JSON, and refuse text that two readers may interpret differently or cannot read.

    Args:
        text: the JSON.
        infinite: also accept NaN and infinity, which JSON does not allow.

    Raises:
        ValueError: the text is not JSON, a number is not finite or needs more than 64 bits, a name
            occurs twice in one mapping, or the nesting exceeds MOST_LEVELS levels.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    kinds: dict[str, Any] = {"object_pairs_hook": _without_twins, "parse_int": _whole}
    if not infinite:
        kinds |= {"parse_float": _finite, "parse_constant": _finite}
    try:
        data = json.loads(text, **kinds)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    require_shallow(data)
    return data


def require_shallow(data: Any) -> None:
    """Refuse lists and mappings that are nested deeper than MOST_LEVELS levels.

    Raises:
        ValueError: the nesting is deeper.
    """
    level = [data]
    for _ in range(MOST_LEVELS):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return
    raise ValueError(f"it is nested on more than {MOST_LEVELS} levels")


def _whole(text: str) -> int:
    number = int(text) if len(text) < 30 else 2**64
    if not -(2**63) <= number < 2**64:
        raise ValueError("a whole number needs more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:20]} is no number of JSON")
    return number


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name stands twice: {next(n for n in names if names.count(n) > 1)!r}")
    return found
