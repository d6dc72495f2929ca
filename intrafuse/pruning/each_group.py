"""Make and apply the merge map of each group that shrinks: what pruning and fusion share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods import Method, Select
from intrafuse.pruning.repair import analytic_repair
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["merge_groups"]


def merge_groups(
    method: Method,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    widths: Mapping[str, int],
    context: Context,
    *,
    repair: Literal["analytic"] | None = None,
) -> tuple[MergeMap, ...]:
    """Reduce groups to given widths, in the order that the method wants.

    Channels that may not be combined (`ChannelGroup.chosen`: heads, the width of queries and keys)
    are selected by their importance, unless the method chooses among them itself. Attention is a
    softmax over products of two activations: the mean of two heads attends to neither's positions,
    and P q and P k give the product q' P' P k, not q' k. The width of values is read linearly, so
    every method may combine it. Channels that a norm takes its statistics over are selected by
    every method: combinations have other statistics, which no weight makes up for.

    Args:
        method: scores and width to merge map.
        groups: from input to output; those that have their width already stay.
        scores: importance of the channels, by group name.
        widths: channels to keep, by group name.
        context: its weights are merged; its progress is called with (groups done, groups in all).
        repair: `analytic` adds gains and shifts to every map.

    Returns:
        The maps in the order in which they were applied.

    Raises:
        IntrafuseError: the method returned a map of other sizes.
    """
    forward = getattr(method, "order", "backward") == "forward"
    ordered = groups if forward else list(reversed(groups))
    shrinking = [group for group in ordered if widths[group.name] < group.size]
    maps = []
    for done, group in enumerate(shrinking):
        free = not group.chosen or (getattr(method, "chooses", False) and not group.normed)
        own = method if free else Select()
        step = own(group, scores[group.name], widths[group.name], context).check()
        if (step.group, step.size, step.width) != (group.name, group.size, widths[group.name]):
            raise IntrafuseError(
                f"a method must return the map of {group.size} to {widths[group.name]} channels",
                value=(step.group, step.size, step.width),
                layer=group.name,
            )
        if repair == "analytic" and not group.normed:
            step = analytic_repair(step, group, context)
        context.weights.merge(step)
        maps.append(step)
        if context.progress is not None:
            context.progress(done + 1, len(shrinking))
    return tuple(maps)
