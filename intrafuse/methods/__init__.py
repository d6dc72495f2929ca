"""Compression methods: scores and a width -> the merge map of one group. One file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from intrafuse.methods.auto import Auto
from intrafuse.methods.folding import Folding
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.method import Method
from intrafuse.methods.moment import Moment
from intrafuse.methods.select import Select
from intrafuse.support.errors import IntrafuseError

__all__ = [
    "METHODS",
    "Auto",
    "Folding",
    "IntraFusion",
    "Method",
    "Moment",
    "Select",
    "make_method",
    "resolve_method",
    "settings_of",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Select, IntraFusion, Folding, Moment, Auto)
}


def resolve_method(method: object) -> Method:
    """Return the method of this name with its default settings; return a method unchanged.

    Raises:
        IntrafuseError: no method has that name, or the object is not a method.

    >>> resolve_method("intra-fusion").p
    1.0
    """
    if isinstance(method, str):
        return _kind(method)()
    if not isinstance(method, Method):
        raise IntrafuseError(
            "method must be a name or a method with settings, such as IntraFusion(p=2)",
            value=method,
            usage=True,
            remedy="derive your own method from intrafuse.methods.Method",
        )
    return method


def make_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Make a method from its name and settings; text is converted to the type of the setting.

    Raises:
        IntrafuseError: no method has that name, a setting is unknown, or a value is not allowed.

    >>> make_method("intra-fusion", {"p": "2", "target": "k-means"}).p
    2.0
    """
    kind = _kind(name)
    known = settings_of(kind)
    for setting, value in settings.items():
        if setting not in known:
            having = [n for n, other in METHODS.items() if setting in settings_of(other)]
            raise IntrafuseError(
                f"{name} has no setting {setting}",
                value=value,
                remedy=f"it belongs to {', '.join(having)}"
                if having
                else f"it has {', '.join(known) or 'none'}",
                usage=True,
            )
    return kind(**{name: _value(name, known[name], value) for name, value in settings.items()})


def settings_of(kind: type[Method]) -> dict[str, Any]:
    """Map the names of a method's settings to their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}  # type: ignore[arg-type]


def _value(setting: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal and value not in get_args(hint):
        names = ", ".join(map(str, get_args(hint)))
        raise IntrafuseError(f"{setting} must be one of {names}", value=value, usage=True)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        rule = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise IntrafuseError(f"{setting} must be {rule}", value=value, usage=True) from error


def _kind(name: str) -> type[Method]:
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.3)
        raise IntrafuseError(
            f"method must be one of {', '.join(METHODS)}",
            value=name,
            usage=True,
            remedy=f"did you mean {near[0]}?" if near else None,
        )
    return METHODS[name]
