"""Choose channel groups by name patterns: include, exclude, overrides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.support.errors import IntrafuseError

__all__ = ["choose_groups", "matches", "near_matches", "require_matches"]


def matches(group: ChannelGroup, pattern: str) -> bool:
    """Tell whether a pattern matches a group or a layer that writes its channels.

    A pattern is a name, the name of a module that contains it, or a glob (`layer?.*.conv1`).
    """
    names = (group.name, *group.layers)
    return any(fnmatchcase(n, pattern) or n.startswith(f"{pattern}.") for n in names)


def require_matches(patterns: Sequence[str], graph: ChannelGraph, argument: str) -> None:
    """Refuse a pattern that matches no group of the graph, prunable or locked.

    Raises:
        IntrafuseError: a pattern matches no group; the message lists near matches.
    """
    groups = (*graph.groups, *graph.locked)
    names = sorted({name for group in groups for name in (group.name, *group.layers)})
    for pattern in patterns:
        if not any(matches(group, pattern) for group in groups):
            norms = pattern.endswith("#normed")
            raise IntrafuseError(
                f"a pattern in {argument} matches no channel group",
                value=pattern,
                usage=True,
                remedy=_to_name(graph.locked) if norms else near_matches(pattern, names),
            )


def near_matches(name: str, names: Sequence[str]) -> str:
    """Write the remedy for an unknown name: the near matches among the sorted names."""
    near = get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return f"near matches: {', '.join(near)}"


def _to_name(locked: Iterable[ChannelGroup]) -> str:
    """Write the remedy for a pattern that should unlock a group that a norm reduces over."""
    held = [group.name for group in locked if group.held]
    if not held:
        return "this network has no group that such a name unlocks: see `intrafuse inspect`"
    return f"include={held[:3]} (--include)"


def choose_groups(
    graph: ChannelGraph, include: Sequence[str] | None, exclude: Sequence[str]
) -> list[ChannelGroup]:
    """List the prunable groups that an include pattern and no exclude pattern matches.

    Raises:
        IntrafuseError: a pattern matches no group, or includes only locked groups.
    """
    require_matches(include or (), graph, "include")
    require_matches(exclude, graph, "exclude")
    for pattern in include or ():
        locked = [group for group in graph.locked if matches(group, pattern)]
        if locked and not any(matches(group, pattern) for group in graph.groups):
            first = next((group for group in locked if group.held), locked[0])
            raise IntrafuseError(
                "an included group must keep its size: " + "; ".join(first.locked),
                layer=first.name,
                usage=True,
                remedy=_to_name(locked) if first.held else "see `intrafuse inspect`",
            )
    return [
        group
        for group in graph.groups
        if (include is None or any(matches(group, p) for p in include))
        and not any(matches(group, p) for p in exclude)
    ]
