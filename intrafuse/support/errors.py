"""The only exception class of the package: each error names rule, value, layer and remedy."""

from __future__ import annotations

__all__ = ["IntrafuseError", "printable"]

_MISSING = object()
LONGEST = 1000  # most characters of a value that a message shows


class IntrafuseError(ValueError):
    """Say why an input was refused, and what to do instead.

    Args:
        rule: the broken rule, as a sentence without a period.
        value: the received value, if any.
        layer: the layer, parameter or channel group that broke the rule.
        remedy: how the user can fix it, as a sentence without a period.
        usage: True if the command line was misused (exit status 2 instead of 1).

    >>> print(IntrafuseError("channels must lie in [0, 1)", value=1.5, remedy="try channels=0.5"))
    channels must lie in [0, 1); got 1.5. Remedy: try channels=0.5
    """

    def __init__(
        self,
        rule: str,
        *,
        value: object = _MISSING,
        layer: str | None = None,
        remedy: str | None = None,
        usage: bool = False,
    ) -> None:
        message = rule
        if layer is not None:
            message += f" (at {layer})"
        if value is not _MISSING:
            message += f"; got {_in_one_line(value)}"
        if remedy is not None:
            message += f". Remedy: {remedy}"
        super().__init__(printable(message))
        self.rule, self.layer, self.remedy, self.usage = rule, layer, remedy, usage


def _in_one_line(value: object) -> str:
    """Write a value on one line, cut to LONGEST characters."""
    try:
        text = repr(value)
    except Exception as error:  # an int with thousands of digits, a user's object
        text = f"a {type(value).__name__} that cannot be written ({type(error).__name__})"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def printable(text: str) -> str:
    r"""Escape control characters and lone surrogates: a terminal obeys them, files refuse them.

    Names of layers, files and records may come from untrusted sources. Newlines and tabs stay.

    >>> print(printable("a\x1b[31m \udc80 ü"))
    a\x1b[31m \udc80 ü
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
