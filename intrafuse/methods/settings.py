"""Checks that the settings of several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from intrafuse.support.errors import IntrafuseError

__all__ = ["check_choice", "check_choices"]


def check_choice(setting: str, value: object, allowed: Any, *, optional: bool = False) -> None:
    """Refuse a value that is not among those of a Literal type; `optional` allows None as well.

    Raises:
        IntrafuseError: names the setting and what it may be.
    """
    known = get_args(allowed)
    if value not in known and not (optional and value is None):
        rule = f"{setting} must be one of {', '.join(known)}" + (", or None" if optional else "")
        raise IntrafuseError(rule, value=value, usage=True)


def check_choices(method: object, choices: Mapping[str, Any]) -> None:
    """Refuse a setting whose value is not among those of its Literal type.

    Raises:
        IntrafuseError: names the setting and what it may be.
    """
    for setting, allowed in choices.items():
        check_choice(setting, getattr(method, setting), allowed)
