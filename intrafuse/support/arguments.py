"""Check the arguments of public functions by name, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any, get_args

from torch import nn

from intrafuse.support.errors import IntrafuseError

__all__ = ["check_arguments", "check_choice", "check_choices"]

Test = Callable[[Any], bool]


def check_arguments(**given: object) -> None:
    """Refuse arguments of the wrong kind. The name of an argument determines its kind.

    Raises:
        IntrafuseError: names the first argument that is wrong.

    >>> check_arguments(seed="x")
    Traceback (most recent call last):
    intrafuse.support.errors.IntrafuseError: seed must be a whole number; got 'x'
    """
    for name, value in given.items():
        kind, fits = KINDS[name]
        if not fits(value):
            short = isinstance(value, str | bool | Real | tuple | list | Mapping | type(None))
            remedy = (
                f"{name}=[{value!r}]" if "patterns" in kind and isinstance(value, str) else None
            )
            raise IntrafuseError(
                f"{name} must be {kind}",
                value=value if short else type(value).__name__,
                usage=True,
                remedy=remedy,
            )


def check_choice(setting: str, value: object, allowed: Any, *, optional: bool = False) -> None:
    """Refuse a value that a Literal type does not list; `optional` also allows None.

    Raises:
        IntrafuseError: names the setting and its allowed values.
    """
    known = get_args(allowed)
    if value not in known and not (optional and value is None):
        rule = f"{setting} must be one of {', '.join(known)}" + (", or None" if optional else "")
        raise IntrafuseError(rule, value=value, usage=True)


def check_choices(method: object, choices: Mapping[str, Any]) -> None:
    """Refuse a setting whose value its Literal type does not list.

    Raises:
        IntrafuseError: names the setting and its allowed values.
    """
    for setting, allowed in choices.items():
        check_choice(setting, getattr(method, setting), allowed)


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _kind(*kinds: type) -> Test:
    return lambda value: isinstance(value, kinds)


def _whole(least: int | None) -> Test:
    return lambda value: (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and (least is None or int(value) >= least)
    )


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _patterns(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(pattern, str) for pattern in value
    )


def _shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(pattern, str) for pattern in value)


KINDS: Mapping[str, tuple[str, Test]] = {
    "model": ("a torch.nn.Module", _kind(nn.Module)),
    "include": ("a list of patterns", _or_none(_patterns)),
    "exclude": ("a list of patterns", _patterns),
    "overrides": ("a mapping of patterns to shares", _shares),
    "seed": ("a whole number", _whole(None)),
    "progress": ("a function (done, total), or None", _or_none(callable)),
    "inplace": ("True or False", _kind(bool)),
    "check": ("True or False", _kind(bool)),
    "tolerance": ("a number above 0", _positive),
    "remove": ("True or False", _kind(bool)),
    "images": ("a whole number from 1", _whole(1)),
    "steps": ("a whole number from 1", _whole(1)),
    "batch_size": ("a whole number from 2", _whole(2)),
    "runs": ("a whole number from 4: latency needs four runs or more", _whole(4)),
    "warm": ("a whole number from 0", _whole(0)),
    "learning_rate": ("a number above 0", _positive),
    "folder": ("a path", _kind(str, PathLike)),
    "out": ("a path", _kind(str, PathLike)),
    "architecture": ("a name, or None", _or_none(_kind(str))),
    "arguments": ("a mapping of JSON data, or None", _or_none(_kind(Mapping))),
    "figures": ("a mapping of JSON data, or None", _or_none(_kind(Mapping))),
    "source_sha256": ("64 hexadecimal digits, or None", _or_none(_kind(str))),
    "device": ("the name of a device", lambda value: not isinstance(value, bool | Integral)),
}
