"""Make and apply the merge map of each group that shrinks, for pruning and for fusion."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods import Method, Select
from intrafuse.pruning.repair import analytic_repair
from intrafuse.pruning.solved import Solved
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["in_order", "map_of", "merge_groups", "merging", "responsible"]


def merge_groups(
    method: Method,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    widths: Mapping[str, int],
    context: Context,
    *,
    repair: Literal["analytic"] | None = None,
) -> tuple[tuple[MergeMap, ...], Solved]:
    """Reduce groups to given widths, in the order that the method wants.

    Channels that may not be combined (`ChannelGroup.chosen`: heads, the width of queries and keys)
    are selected by their importance, unless the method chooses among them itself. Attention is a
    softmax over products of two activations. The mean of two heads attends to the positions of
    neither, and the product of P q and P k is q' P' P k, not q' k. The width of values is read
    linearly, so every method may combine it. Every method selects the channels that a norm
    computes its statistics over: combinations have other statistics, and no weight restores them.

    Args:
        method: maps scores and a width to a merge map.
        groups: from input to output; a group that already has its width does not change.
        scores: importance of the channels (n,), by group name.
        widths: channels to keep, by group name.
        context: its weights are merged; its progress is called with (groups done, all groups).
        repair: `analytic` adds gains and shifts to every map, from analytic moments.

    Returns:
        The maps in the order in which they were applied, and the layers that were solved after
        them.

    Raises:
        IntrafuseError: the method returned a map for another group, size or width.
    """
    maps = tuple(merging(method, groups, scores, widths, context, repair=repair))
    solved = Solved.of(method.solved(maps, context), context.weights)
    solved.put(context.weights)
    return maps, solved


def merging(
    method: Method,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    widths: Mapping[str, int],
    context: Context,
    *,
    repair: Literal["analytic"] | None = None,
    merged: Container[str] = (),
) -> Iterator[MergeMap]:
    """Reduce groups one after the other, and give each map when its group is merged.

    Args:
        method, groups, scores, widths, context, repair: as for `merge_groups`.
        merged: names of groups that the context's weights have merged already.

    Raises:
        IntrafuseError: as for `merge_groups`.
    """
    shrinking = in_order(method, groups, widths)
    for done, group in enumerate(shrinking):
        if group.name not in merged:
            context.pending = frozenset(other.name for other in shrinking[done:])
            merge_map = map_of(method, group, scores[group.name], widths[group.name], context)
            if repair == "analytic" and not group.normed:
                merge_map = analytic_repair(merge_map, group, context)
            context.weights.merge(merge_map)
            yield merge_map
            del merge_map  # its matrices may be large
        if context.progress is not None:
            context.progress(done + 1, len(shrinking))


def in_order(
    method: Method, groups: Sequence[ChannelGroup], widths: Mapping[str, int]
) -> list[ChannelGroup]:
    """List the groups that shrink, in the order that the method wants."""
    ordered = groups if method.order == "forward" else reversed(groups)
    return [group for group in ordered if widths[group.name] < group.size]


def responsible(method: Method, group: ChannelGroup) -> Method:
    """Return the method itself, or selection for channels that it may not combine."""
    free = not group.chosen or (method.chooses and not group.normed)
    return method if free else Select()


def map_of(
    method: Method, group: ChannelGroup, scores: Tensor, width: int, context: Context
) -> MergeMap:
    """Ask the method for a group's map; channels that it may not combine are selected.

    Raises:
        IntrafuseError: the method returned a map for another group, size or width.
    """
    merge_map = responsible(method, group)(group, scores, width, context).check()
    if (merge_map.group, merge_map.size, merge_map.width) != (group.name, group.size, width):
        raise IntrafuseError(
            f"a method must return the map of {group.size} to {width} channels",
            value=(merge_map.group, merge_map.size, merge_map.width),
            layer=group.name,
        )
    return merge_map
