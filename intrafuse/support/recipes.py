"""Read recipes: mappings of settings in YAML or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra
from intrafuse.support.reading import MOST_LEVELS, parse_json, read_text

__all__ = ["read_mapping"]

MOST_BYTES = 2**20


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a recipe from a YAML or JSON file. Only YAML needs the extra `recipes`.

    Raises:
        IntrafuseError: the file cannot be read, or does not hold a mapping.
    """
    try:
        found = _read(path)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        text = " ".join(str(error).split())
        raise IntrafuseError(f"the recipe cannot be read: {text}", value=str(path)) from error
    if not isinstance(found, dict):
        raise IntrafuseError("a recipe is a mapping of settings", value=str(path))
    return found


def _read(path: str | Path) -> Any:
    text = read_text(path, MOST_BYTES)
    try:
        return parse_json(text, infinite=True)
    except ValueError:
        yaml = import_extra("yaml", "recipes")
    try:
        return _parsed(yaml, text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _parsed(yaml: Any, text: str) -> Any:
    """Parse YAML, and refuse aliases, tags, deep nesting and repeated names."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise ValueError(
                f"a recipe cannot use aliases or tags, line {event.start_mark.line + 1}"
            )
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise ValueError(f"it is nested on more than {MOST_LEVELS} levels")
    nodes = [yaml.compose(text, loader)]
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value]
            if len(set(names)) < len(names):
                raise ValueError(f"a name stands twice, line {node.start_mark.line + 1}")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    # Parse once more as JSON, which allows only plain data and numbers of at most 64 bits.
    plain = json.dumps(yaml.load(text, loader), ensure_ascii=False)
    plain.encode("utf-8")  # a lone surrogate raises a ValueError
    return parse_json(plain, infinite=True)
