"""The settings of pruning, shared by keyword arguments, recipes and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypedDict, TypeVar

from intrafuse.allocation.budget import Budget, BudgetScope
from intrafuse.importance.metrics import Importance
from intrafuse.methods import Method, make_method, resolve_method
from intrafuse.support.arguments import check_arguments, check_choice
from intrafuse.support.errors import IntrafuseError

__all__ = ["Arguments", "Repair", "Settings", "name_of", "takes_settings"]

Repair = Literal["analytic", "batchnorm", "synthetic"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Arguments(TypedDict, total=False):
    """The fields of `Settings`, as keyword arguments."""

    channels: float | None
    params: float | None
    macs: float | None
    latency: float | None
    budget: Budget | None
    method: str | Method
    importance: str | Importance
    scope: BudgetScope
    include: Sequence[str] | None
    exclude: Sequence[str]
    overrides: Mapping[str, float] | None
    floor: float
    round_to: int
    seed: int
    repair: Repair | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to prune: everything that decides the result, except the network and the data.

    Attributes:
        channels, params, macs, latency: the budget: the share to remove, in [0, 1). At most one may
            be given; `plan` and `prune` need one. Latency is the time of one call with the example
            inputs on the model's device, predicted from a few timed networks (`LatencyModel`).
        budget: a `Budget` in place of these four and of `scope`, `floor`, `round_to`, `overrides`.
        method: `select`, `intra-fusion`, `folding`, `moment`, `auto`, or a method with its own
            settings, such as `IntraFusion(p=2)`.
        importance: a metric's name, or a callable `(group, context) -> scores (channels,)`.
        scope: `uniform` removes the same share in every group; `global` ranks all channels
            together; `predicted` removes channels from the groups where moments predict the least
            damage for the size saved. With `global` and `predicted` every group keeps at least
            the share `floor`.
        include, exclude: patterns of group or layer names; by default every prunable group.
        overrides: share of channels to remove, by pattern.
        floor: smallest share of its channels that a group keeps; `uniform` ignores it.
        round_to: widths are multiples of this.
        seed: seeds everything random.
        repair: `analytic` scales and shifts the outputs of each group's readers to restore their
            mean and variance, from analytic moments (`moment` and `auto` always do so).
            `batchnorm` re-estimates the statistics of batch norm from the data, `synthetic` from
            inputs made without data (`synthesise`). These two run after surgery, so `plan` refuses
            them.

    Raises:
        IntrafuseError: a value is not allowed; the error names the field.

    >>> Settings(channels=0.5).wanted.share
    0.5
    """

    channels: float | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    budget: Budget | None = None
    method: str | Method = "intra-fusion"
    importance: str | Importance = "l1"
    scope: BudgetScope = "uniform"
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    overrides: Mapping[str, float] | None = None
    floor: float = 0.1
    round_to: int = 1
    seed: int = 0
    repair: Repair | None = None

    def __post_init__(self) -> None:
        check_arguments(include=self.include, exclude=self.exclude, seed=self.seed)
        check_choice("repair", self.repair, Repair, optional=True)
        if self.budget is None and all(getattr(self, name) is None for name in Budget.SHARES):
            Budget(kind="channels", share=0.0, **self._limits())  # the share may follow
        else:
            _ = self.wanted  # a Budget checks itself

    def _limits(self) -> dict[str, Any]:
        limits = {name: getattr(self, name) for name in LIMITS}
        return {**limits, "overrides": {} if self.overrides is None else self.overrides}

    @cached_property
    def wanted(self) -> Budget:
        """The budget: how much to remove, and where.

        Raises:
            IntrafuseError: no budget was given, or more than one.
        """
        shares: Any = {name: getattr(self, name) for name in Budget.SHARES}
        if self.budget is None:
            return Budget.of(shares, **self._limits())
        if not isinstance(self.budget, Budget):
            raise IntrafuseError("budget must be a Budget", value=self.budget, usage=True)
        given = {**shares, **{name: getattr(self, name) for name in LIMITS}}
        twice = [name for name, value in given.items() if value != DEFAULTS[name]]
        if twice:
            raise IntrafuseError(
                f"budget= already sets {twice[0]}", value=given[twice[0]], usage=True
            )
        return self.budget

    @cached_property
    def compression(self) -> Method:
        """The method, as an object."""
        return resolve_method(self.method)

    @classmethod
    def of(cls, settings: Settings | None, arguments: Mapping[str, Any]) -> Settings:
        """Return settings with some fields replaced by keyword arguments.

        Raises:
            TypeError: an argument is unknown.
            IntrafuseError: `settings` is not a `Settings` object.
        """
        if settings is None:
            return cls(**arguments)
        if not isinstance(settings, Settings):
            raise IntrafuseError(
                "settings must be a Settings object",
                value=type(settings).__name__,
                usage=True,
                remedy="name a budget, such as channels=0.5",
            )
        shares = dict.fromkeys(("budget", *Budget.SHARES))
        # a new budget replaces the old one
        again = any(arguments.get(name) is not None for name in shares)
        return replace(settings, **{**(shares if again else {}), **arguments})

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """Make settings from plain data, such as a recipe; see `as_data`.

        Raises:
            IntrafuseError: a field is unknown or wrong; the error names it.

        >>> Settings.from_data({"params": 0.4, "method": {"name": "intra-fusion", "p": 2}}).method.p
        2.0
        """
        given = dict(data)
        for name in given:
            if name not in DEFAULTS or name == "budget":
                near = get_close_matches(str(name), DEFAULTS, n=1)
                raise IntrafuseError(
                    "there is no such setting",
                    value=name,
                    usage=True,
                    remedy=f"did you mean {near[0]}?" if near else f"one of {', '.join(DEFAULTS)}",
                )
        method = given.get("method")
        if isinstance(method, Mapping):
            own = {key: value for key, value in method.items() if key != "name"}
            given["method"] = make_method(str(method.get("name")), own)
        return cls(**given)

    def as_data(self) -> dict[str, Any]:
        """Return all settings as plain data, from which `from_data` makes equal settings.

        Raises:
            IntrafuseError: the importance is a function, which a file cannot hold.
        """
        if not isinstance(self.importance, str):
            raise IntrafuseError(
                "a recipe cannot hold an importance that is a function",
                value=name_of(self.importance),
            )
        budget = self.wanted
        return {
            budget.kind: budget.share,
            "method": self.compression.as_data(),
            "importance": self.importance,
            "scope": budget.scope,
            "include": None if self.include is None else [*self.include],
            "exclude": [*self.exclude],
            "overrides": dict(budget.overrides),
            "floor": budget.floor,
            "round_to": budget.round_to,
            "seed": int(self.seed),
            "repair": self.repair,
        }


LIMITS = ("scope", "floor", "round_to", "overrides")
DEFAULTS = {field.name: field.default for field in fields(Settings)}


def name_of(function: object) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def takes_settings(function: Function) -> Function:
    """Add the fields of `Settings` to the signature of a function that takes them as keywords."""
    own = inspect.signature(function)
    shown = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    positional = [p for p in shown if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = inspect.signature(Settings).parameters.values()
    function.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*positional, *keywords, *(p for p in shown if p.kind is p.KEYWORD_ONLY)]
    )
    return function
