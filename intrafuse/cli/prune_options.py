"""Options that say how to prune: the fields of `Settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.options import Common, numbers
from intrafuse.support.errors import IntrafuseError

if TYPE_CHECKING:
    from intrafuse.pruning.settings import Settings

__all__ = ["GroupOptions", "PruneOptions"]


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options that choose the groups to prune."""

    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Prune only these groups or layers; repeatable."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Do not prune these groups or layers; repeatable."),
    ] = None

    def chosen(self) -> dict[str, Any]:
        """Return the fields of `Settings` that were given."""
        given = {"include": self.include, "exclude": self.exclude}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class PruneOptions(GroupOptions):
    """Settings of pruning, except budget and method."""

    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings in YAML or JSON; options override them."),
    ] = None
    importance: Annotated[
        str | None,
        typer.Option(help="Importance metric, such as taylor; default: l1; x lists all."),
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            help="uniform (default): equal shares; global: one ranking; predicted: by damage."
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=SHARE", help="Share to remove there; repeatable."),
    ] = None
    floor: Annotated[
        float | None,
        typer.Option(help="Least share of channels to keep, except for uniform; 0.1."),
    ] = None
    round_to: Annotated[int | None, typer.Option(help="Round widths to multiples of this.")] = None
    repair: Annotated[
        str | None,
        typer.Option(help="Repair of statistics: batchnorm (needs --data), synthetic or analytic."),
    ] = None

    def settings(self, common: Common, **given: Any) -> Settings:
        """Make settings from the recipe, overridden by the given options.

        Args:
            common: its seed applies if it is not 0, or if the recipe has no seed.
            given: further fields of `Settings`; None means not given.
        """
        from intrafuse.pruning.settings import Settings
        from intrafuse.support.recipes import read_mapping

        named = ("importance", "scope", "floor", "round_to", "repair")
        fields = {name: getattr(self, name) for name in named} | given
        fields = {name: value for name, value in fields.items() if value is not None}
        if self.override:
            fields["overrides"] = dict(map(_override, self.override))
        recipe = {} if self.recipe is None else read_mapping(self.recipe)
        if common.seed or "seed" not in recipe:
            fields["seed"] = common.seed
        return Settings.of(Settings.from_data(recipe), {**fields, **self.chosen()})


def _override(item: str) -> tuple[str, float]:
    pattern, equals, share = item.rpartition("=")
    if not equals or not pattern:
        raise IntrafuseError("--override takes PATTERN=SHARE", value=item, usage=True)
    return pattern, numbers("--override", share, float)[0]
