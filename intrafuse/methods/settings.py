"""Checks that the settings of several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from intrafuse.errors import IntrafuseError

__all__ = ["check_choices"]


def check_choices(method: object, choices: Mapping[str, Any]) -> None:
    """Refuse a setting whose value is not among those of its Literal type.

    Raises:
        IntrafuseError: names the setting and what it may be.
    """
    for setting, allowed in choices.items():
        value, known = getattr(method, setting), get_args(allowed)
        if value not in known:
            rule = f"{setting} must be one of {', '.join(known)}"
            raise IntrafuseError(rule, value=value, usage=True)
