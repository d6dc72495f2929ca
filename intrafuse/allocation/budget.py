"""Choose how many channels each group keeps, from scores and a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from intrafuse.allocation.patterns import matches, require_matches
from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.support.arguments import check_arguments
from intrafuse.support.errors import IntrafuseError

__all__ = ["Budget", "Figures", "choose_widths", "measure"]

Kind = Literal["channels", "params", "macs", "latency"]
BudgetScope = Literal["uniform", "global", "predicted"]
KINDS: tuple[Kind, ...] = ("channels", "params", "macs")  # kinds that are counted, not timed
SCOPES: tuple[BudgetScope, ...] = ("uniform", "global", "predicted")
STEPS = 64  # most widths of a group that `predicted` considers
UNKNOWN = 1e12  # damage of shrinking a group without moments


@dataclass(frozen=True)
class Figures:
    """The size of a network.

    Attributes:
        channels: number of channels of all prunable groups.
        params: number of elements of all parameters, without buffers.
        macs: multiply-accumulates for one sample of the traced size.
    """

    channels: int
    params: int
    macs: int

    def removed(self, before: Figures) -> dict[str, float]:
        """Return the removed share, in [0, 1], of channels, params and macs."""
        return {kind: 1 - getattr(self, kind) / max(getattr(before, kind), 1) for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The share to remove, and its distribution over groups.

    Attributes:
        kind: the unit of the share: `channels`, `params`, `macs`, or predicted `latency`.
        share: the fraction to remove, in [0, 1).
        scope: `uniform` removes the same share of channels in every group. `global` ranks the
            channels of all groups together, with scores divided by the mean of their group.
            `predicted` repeatedly shrinks the group with the least predicted damage per saving.
        floor: the least share of its channels that every group keeps; ignored by `uniform`.
        round_to: widths are multiples of this number, if a group has that many channels.
        overrides: share of channels to remove, by pattern of group or layer names. The first
            matching pattern applies.
    """

    SHARES: ClassVar[tuple[Kind, ...]] = (*KINDS, "latency")

    kind: Kind
    share: float
    scope: BudgetScope = "uniform"
    floor: float = 0.1
    round_to: int = 1
    overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(overrides=self.overrides)
        if self.kind not in self.SHARES:
            kinds = ", ".join(self.SHARES)
            raise IntrafuseError(f"kind must be one of {kinds}", value=self.kind, usage=True)
        for name, share in (
            (self.kind, self.share),
            *((f"overrides[{name!r}]", share) for name, share in self.overrides.items()),
            ("floor", self.floor),
        ):
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not 0 <= share < 1:
                raise IntrafuseError(
                    f"{name} must be a share in [0, 1)",
                    value=share,
                    usage=True,
                    remedy="0.5 removes half",
                )
        if self.scope not in SCOPES:
            raise IntrafuseError(
                f"scope must be one of {', '.join(SCOPES)}", value=self.scope, usage=True
            )
        if type(self.round_to) is not int or self.round_to < 1:
            raise IntrafuseError(
                "round_to must be a whole number from 1", value=self.round_to, usage=True
            )

    @classmethod
    def of(cls, shares: Mapping[Kind, float | None], **settings) -> Budget:
        """Make a budget from the only share that is not None.

        Raises:
            IntrafuseError: there is no share or more than one, or it lies outside [0, 1).

        >>> Budget.of({"channels": 0.5, "params": None, "macs": None}).kind
        'channels'
        """
        given = {name: share for name, share in shares.items() if share is not None}
        if len(given) != 1:
            raise IntrafuseError(
                f"exactly one budget of {', '.join(shares)} must be given",
                value=given or None,
                usage=True,
                remedy="for example channels=0.5",
            )
        ((kind, share),) = given.items()
        return cls(kind=cast(Kind, kind), share=share, **settings)


def measure(graph: ChannelGraph, sizes: Mapping[int, int], counted: Mapping[str, int]) -> Figures:
    """Count channels, parameters and multiply-accumulates at given sizes of the atoms.

    Args:
        graph: the channel graph.
        sizes: the size of every atom.
        counted: the parameters that exist, with their traced number of elements.
    """
    params = 0
    for name, elements in counted.items():
        if name in graph.axes:
            elements = 1
            for n in graph.shape(name, sizes):
                elements *= n
        params += elements
    channels = sum(sizes[group.id] for group in graph.groups)
    return Figures(channels, params, graph.macs(sizes))


def choose_widths(
    graph: ChannelGraph,
    groups: list[ChannelGroup],
    scores: Mapping[str, Tensor],
    budget: Budget,
    amount: Callable[[Mapping[str, int]], float],
    damage: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Choose how many channels each group keeps.

    Args:
        graph: the channel graph.
        groups: the groups that may shrink.
        scores: importance (channels,) by group name, for `scope="global"`.
        budget: what to remove.
        amount: maps widths by group name to the quantity that the budget counts.
        damage: predicted damage at each width, (channels + 1,), by group name, for
            `scope="predicted"`.

    Returns:
        Widths by group name, at least 1 each. They remove at least the budget's share. Among such
        widths that the scope can produce, they remove least.

    Raises:
        IntrafuseError: the groups cannot lose that share, or an override matches no group.
    """
    require_matches(list(budget.overrides), graph, "overrides")
    fixed = {g.name: share for g in groups if (share := _override(g, budget)) is not None}
    free = [group for group in groups if group.name not in fixed]
    base = {
        g.name: _round(g.size, g.size * (1 - fixed[g.name]), budget)
        for g in groups
        if g.name in fixed
    }
    if budget.scope == "predicted":
        steps, widths_at = _predicted_ladder(free, damage or {}, base, budget, amount)
    else:
        ladder = _uniform_ladder if budget.scope == "uniform" else _global_ladder
        steps, widths_at = ladder(free, scores, budget)
    if groups and budget.kind == "channels" and budget.scope == "uniform":
        return {**base, **widths_at(budget.share)}
    before = amount({})
    groups_before = sum(group.size for group in groups)

    def removed(step: float) -> float:
        widths = {**base, **widths_at(step)}
        if budget.kind == "channels":  # of the groups that may shrink
            return 1 - sum(widths.values()) / groups_before if groups_before else 0.0
        return 1 - amount(widths) / max(before, 1e-300)

    return {**base, **widths_at(_first_enough(steps, removed, budget, graph))}


def _locked(graph: ChannelGraph) -> str:
    """Write a sentence that names up to three locked groups with reasons, and counts the rest.

    Groups that the code locks come first, then groups that are locked in every network.
    """
    own = {"model input", "model output", "a single channel"}
    locked = sorted(graph.locked, key=lambda group: bool(own.intersection(group.locked)))
    if not locked:
        return "" if graph.groups else ". No layer of the network writes channels"
    named = "; ".join(f"{group.name} ({group.locked[0]})" for group in locked[:3])
    more = f", and {len(locked) - 3} more (intrafuse inspect)" if len(locked) > 3 else ""
    return f". These must keep their size: {named}{more}"


def _first_enough(
    steps: Sequence[float], removed: Callable[[float], float], budget: Budget, graph: ChannelGraph
) -> float:
    """Find the first step that removes at least the budget's share."""
    most = removed(steps[-1])
    if most < budget.share - 1e-12:
        raise IntrafuseError(
            f"the unlocked groups cannot shed that share of {budget.kind}",
            value=budget.share,
            remedy=f"at most {floor(max(most, 0) * 1e4) / 1e4:.4f} can be removed; lower the "
            "budget, the floor or round_to, or exclude less" + _locked(graph),
        )
    # Folding may add biases, so the first step may remove a negative share: check it separately.
    low, high = 0, 0 if removed(steps[0]) >= budget.share - 1e-12 else len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if removed(steps[middle]) >= budget.share - 1e-12 else (middle + 1, high)
        )
    return steps[low]


def _override(group: ChannelGroup, budget: Budget) -> float | None:
    return next((s for p, s in budget.overrides.items() if matches(group, p)), None)


def _round(size: int, width: float, budget: Budget, least: int = 1) -> int:
    """Round a width down to a multiple of round_to; keep one multiple and `least` channels."""
    whole = floor(width + 1e-9)
    if whole >= size:
        return size
    step = min(budget.round_to, size)
    lowest = -(-max(least, 1) // step) * step
    return min(size, max(lowest, whole // step * step))


def _least(group: ChannelGroup, budget: Budget) -> int:
    return max(1, -(-int(group.size * budget.floor * 1000) // 1000))


def _uniform_ladder(groups, scores, budget: Budget):
    """Return every share at which a width changes, and a function from share to widths."""

    def widths_at(share: float) -> dict[str, int]:
        return {g.name: _round(g.size, g.size * (1 - share), budget) for g in groups}

    sizes = sorted({group.size for group in groups})
    shares = sorted({removed / size for size in sizes for removed in range(size)})
    return shares or [0.0], widths_at


def _global_ladder(groups, scores: Mapping[str, Tensor], budget: Budget):
    """Return every removable number of channels, and a function from number to widths."""
    rows, owner, floors = [], [], []
    for i, group in enumerate(groups):
        score = scores[group.name].double().cpu()
        score = (score / score.mean().abs().clamp_min(1e-300)).sort(descending=True).values
        least = _least(group, budget)
        floors.append(least)
        rows.append(score[least:])
        owner.append(torch.full((len(score) - least,), i))
    if not rows:
        return [0], lambda count: {}
    order = torch.cat(rows).sort(stable=True).indices
    ranked = torch.cat(owner)[order]

    def widths_at(count: float) -> dict[str, int]:
        gone = torch.bincount(ranked[: int(count)], minlength=len(groups)).tolist()
        return {
            g.name: _round(g.size, g.size - k, budget, least)
            for g, k, least in zip(groups, gone, floors, strict=True)
        }

    return range(len(ranked) + 1), widths_at


def _predicted_ladder(
    groups: Sequence[ChannelGroup],
    damage: Mapping[str, np.ndarray],
    base: Mapping[str, int],
    budget: Budget,
    amount: Callable[[Mapping[str, int]], float],
):
    """Return all steps of a greedy descent that shrinks the group with least damage per saving."""
    widths = {group.name: group.size for group in groups}
    offers = {g.name: _offers(g, damage.get(g.name), budget) for g in groups}
    path = [dict(widths)]
    now = amount({**base, **widths})
    while any(offers.values()):
        best = (float("inf"), "", 0)
        for name, own in offers.items():
            if own:
                then = amount({**base, **widths, name: own[0][0]})
                price = (own[0][1] + 1e-12) / max(now - then, 1e-9)
                best = min(best, (price, name, then))
        _, name, now = best
        widths[name] = offers[name].pop(0)[0]
        path.append(dict(widths))
    return range(len(path)), lambda step: path[int(step)]


def _offers(
    group: ChannelGroup, damage: np.ndarray | None, budget: Budget
) -> list[tuple[int, float]]:
    """List decreasing widths of a group, each with the damage added since the previous one."""
    stride = max(1, group.size // STEPS)
    least = _least(group, budget)
    steps = (*range(group.size, least, -stride), least)  # always includes the floor
    widths = list(dict.fromkeys(_round(group.size, w, budget, least) for w in steps))
    if damage is None:  # its damage is unknown: it shrinks last
        return [(w, UNKNOWN) for w in widths[1:]]
    return [(b, float(damage[b] - damage[a])) for a, b in itertools.pairwise(widths)]
