"""The one exception class of the package: every refusal names rule, value, layer and remedy."""

from __future__ import annotations

__all__ = ["IntrafuseError", "printable"]

_MISSING = object()
LONGEST = 1000  # characters of a value that a message repeats


class IntrafuseError(ValueError):
    """Say why an input was refused, and what to do instead.

    Args:
        rule: the rule that was broken, as a sentence without its full stop.
        value: the value received, where there is one.
        layer: the layer, parameter or channel group concerned.
        remedy: what the user can do, as a sentence without its full stop.
        usage: True where the command line was misused (exit status 2, not 1).

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
    """Write a value in one line, and cut what is too long to be read."""
    try:
        text = repr(value)
    except Exception as error:  # a number of thousands of digits, an object of a user
        text = f"a {type(value).__name__} that cannot be written ({type(error).__name__})"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def printable(text: str) -> str:
    r"""Write as escapes what a terminal would obey, and halves of characters, which no file takes.

    Names of layers, files and records come from others. Lines and tabs stay.

    >>> print(printable("a\x1b[31m \udc80 ü"))
    a\x1b[31m \udc80 ü
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
