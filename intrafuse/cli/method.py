"""Options for the settings of any method: the fields of its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from intrafuse.cli.options import SETTINGS

if TYPE_CHECKING:
    from intrafuse.methods import Method

__all__ = ["MethodOptions"]


class _MethodCommand(TyperCommand):
    """A command that also takes undeclared options: the settings of a method."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        declared: dict[str, Any] = {
            name: parameter
            for parameter in self.get_params(ctx)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        settings: dict[str, str] = {}
        ctx.meta[__name__] = settings
        rest, words = [], iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if word == "--":
                rest += [word, *words]
            elif not word.startswith("--") or name in declared:
                rest.append(word)
                if word.startswith("--") and not equals and _takes_value(declared[name]):
                    rest += _next(words)
            else:
                _require_setting(name, [*declared], ctx)
                values = [value] if equals else [*_next(words)]
                if not values:
                    ctx.fail(f"Option {name!r} requires an argument.")
                settings[name] = values[0]
        return super().parse_args(ctx, rest)


def _takes_value(parameter: Any) -> bool:
    return not getattr(parameter, "is_flag", False) and not getattr(parameter, "count", False)


def _next(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        yield word
        return


def _require_setting(option: str, declared: list[str], ctx: typer.Context) -> None:
    """Refuse an option that no method has as a setting."""
    from intrafuse.methods import METHODS, settings_of

    known = {_option(name) for kind in METHODS.values() for name in settings_of(kind)}
    if option not in known:
        near = get_close_matches(option, [*declared, *known], n=1)
        ctx.fail(f"No such option: {option}" + (f". Did you mean {near[0]}?" if near else ""))


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Choose a method; its settings are the fields of its class in `intrafuse.methods`."""

    COMMAND: ClassVar[type[TyperCommand]] = _MethodCommand

    method: Annotated[
        str | None,
        typer.Option(
            help="Method; default: intra-fusion; an unknown name lists all. Its settings are "
            "options, too, such as --p 2."
        ),
    ] = None

    def build(self) -> Method | None:
        """Make the method with its settings; None if neither was given.

        Raises:
            IntrafuseError: the method does not have a setting, or the value is invalid.
        """
        from intrafuse.methods import make_method

        given = SETTINGS.get()
        if self.method is None and not given:
            return None
        settings = {name[2:].replace("-", "_"): value for name, value in given.items()}
        return make_method(self.method or "intra-fusion", settings)
