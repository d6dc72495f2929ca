"""Refuse networks whose channel graphs differ, and name the first difference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from intrafuse.graph.groups import ChannelGraph, ChannelGroup
from intrafuse.graph.rules import location, operator_name
from intrafuse.support.errors import IntrafuseError

__all__ = ["require_equal_widths", "require_same_structure"]

REMEDY = "fuse networks of one architecture, which may differ in the widths of their groups"


def require_same_structure(reference: ChannelGraph, graph: ChannelGraph, number: int) -> None:
    """Refuse a network whose structure differs from the reference, except in widths.

    Args:
        reference: the graph of the reference network.
        graph: the graph of another network.
        number: number of the other network in messages, from 1.

    Raises:
        IntrafuseError: the structures differ; the error names the first group, parameter or
            operator that differs.
    """
    for own, other in zip_longest(reference.groups, graph.groups):
        _compare(own, other, graph, number)
    for own, other in zip_longest(reference.locked, graph.locked):
        _compare(own, other, graph, number)
        if own.size != other.size:
            raise _differs(own.name, number, f"must keep {own.size} channels", other.size)
    sizes = graph.resized(reference.widths)
    for name in sorted(reference.axes.keys() | graph.axes.keys()):
        if name not in graph.axes or name not in reference.axes:
            missing = "lacks a parameter of" if name not in graph.axes else "has one more than"
            raise _differs(name, number, f"{missing} the reference", None)
        wanted = reference.shape(name, reference.sizes)
        if graph.shape(name, sizes) != wanted:
            rule = f"must have the shape {wanted} at the widths of the reference"
            raise _differs(name, number, rule, graph.shape(name, sizes))
    _compare_programs(reference, graph, number)
    if graph.macs(sizes) != reference.macs(reference.sizes):
        rule = f"must take {reference.macs(reference.sizes)} MACs at the widths of the reference"
        raise _differs(None, number, rule, graph.macs(sizes))


def require_equal_widths(graphs: Sequence[ChannelGraph], reference: int) -> None:
    """Refuse networks of different widths.

    Raises:
        IntrafuseError: the widths differ; the error names the first such group.
    """
    for group in graphs[reference].groups:
        sizes = [graph.by_name[group.name].size for graph in graphs]
        if len(set(sizes)) > 1:
            raise IntrafuseError(
                "assignment needs networks of equal widths",
                value=sizes,
                layer=group.name,
                remedy='use method="ot" or "moment"',
            )


def _compare(
    own: ChannelGroup | None, other: ChannelGroup | None, graph: ChannelGraph, number: int
) -> None:
    """Refuse two groups that do not couple the same axes of the same parameters."""
    if own is None or other is None or own.name != other.name:
        name = (own or other).name  # type: ignore[union-attr]
        why = [g.locked for g in graph.locked if own is not None and g.name == own.name]
        note = f", as there it must keep its size ({'; '.join(why[0])})" if why else ""
        value = None if other is None else other.name
        raise _differs(name, number, f"is no prunable group of that network{note}", value)
    slots = [{(s.parameter, s.axis, s.role, s.kind) for s in g.slots} for g in (own, other)]
    if slots[0] != slots[1]:
        only = sorted(slots[0] ^ slots[1])[0]
        having = "only the reference" if only in slots[0] else "only that network"
        rule = f"does not couple the same axes: {having} has axis {only[1]} of {only[0]}"
        raise _differs(own.name, number, rule, None)


def _compare_programs(reference: ChannelGraph, graph: ChannelGraph, number: int) -> None:
    programs = [g.traced.nodes if g.traced is not None else () for g in (reference, graph)]
    own, other = ([n for n in nodes if n.op == "call_function"] for nodes in programs)
    for a, b in zip_longest(own, other):
        if a is None or b is None or operator_name(a) != operator_name(b):
            names = [None if node is None else operator_name(node) for node in (a, b)]
            node = a if a is not None else b
            assert node is not None
            where = location(node) or str(node)
            raise _differs(where, number, f"runs {names[0]} in the reference", names[1])


def _differs(name: str | None, number: int, rule: str, value: object) -> IntrafuseError:
    received = "" if value is None else f", not {value!r}"
    return IntrafuseError(
        f"network {number} is not built as the reference is: {name or 'it'} {rule}{received}",
        layer=name,
        remedy=REMEDY,
    )
