"""Couple axes if the code computes the size of one from the size of the other.

In attention, the joint width of the heads may equal the input width, or the width of each head may
equal the input width divided by the number of heads. Such a number follows the input axis, so the
two axes are coupled. Their channels are then removed together, and the code stays correct.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from torch.fx import Node

from intrafuse.graph.axes import Product, Tree, tree_size
from intrafuse.graph.rules import Literal, modules_of
from intrafuse.graph.rules.registry import Result
from intrafuse.graph.sizes.trials import Place, Trials, value_at

__all__ = ["couple", "divide"]

MOST = 8  # most equal parts into which code divides an axis


def couple(
    trials: Trials, items: list[Literal], node: Node, number: int, sizes: Mapping[int, int]
) -> bool:
    """Couple an axis with the axis whose size a number follows, in every layer with this code.

    Args:
        trials: the results of the trials so far.
        items: the number at one place of the code, in every layer that runs it.
        node: the operator that received the number at other sizes.
        number: the number at these sizes.
        sizes: these sizes of all atoms.

    Returns:
        Whether there is such an axis that may shrink.
    """
    own = next((item for item in items if item.node is node), None)
    measure, resolve = trials.scope.table.measure, trials.scope.table.resolve
    if own is None or number == measure(own.part):
        return False
    for spot in _spots(trials, node):
        tree = _tree(trials, spot)
        if trials.scope.is_fixed(tree):
            continue
        for other in (None, *_beside(trials, own)):
            times = 1 if other is None else tree_size(resolve(other.part), sizes)
            whole = measure(own.part) * (1 if other is None else measure(other.part))
            if measure(tree) == whole and tree_size(tree, sizes) // times == number:
                _unify(trials, items, own, spot, other)
                return True
    return False


def divide(trials: Trials, items: list[Literal], number: int, sizes: Mapping[int, int]) -> bool:
    """Couple the equal parts of an axis if the code divides its size (`x.shape[1] // 2`).

    Args:
        trials: the results of the trials so far.
        items: the number at one place of the code, in every layer that runs it.
        number: the number at other sizes.
        sizes: these sizes of all atoms.

    Returns:
        Whether the number is such a quotient and the parts were not coupled before.
    """
    table, coupled = trials.scope.table, False
    quotients = [(item, _quotient(trials, item, number, sizes)) for item in items]
    for item, q in quotients:  # computed before the first cut, which makes new atoms
        if q == 1:
            continue
        axis = table.resolve(item.axis)
        first, rest = table.cut(axis, table.measure(axis) // q)
        for _ in range(q - 1):
            part, rest = table.cut(rest, table.measure(first))
            coupled |= table.resolve(part) != table.resolve(first)
            table.unify(first, part)
    return coupled


def _quotient(trials: Trials, item: Literal, number: int, sizes: Mapping[int, int]) -> int:
    """Return the number of equal parts into which a number divides its axis; 1 if none fits."""
    table = trials.scope.table
    axis, size = table.resolve(item.axis), table.measure(item.part)
    share = Fraction(size, table.measure(axis))
    p, q, total = share.numerator, share.denominator, tree_size(axis, sizes)
    rounded = abs(number * q - total * p) < q  # rounded up or down
    return q if q <= MOST and number != size and rounded else 1


@dataclass(frozen=True)
class _Spot:
    """An axis of an operand (by its index) or of the result (index -1) of an operator."""

    node: Node
    operand: int
    at: tuple[int, ...]


def _unify(
    trials: Trials, items: list[Literal], own: Literal, spot: _Spot, other: Literal | None
) -> None:
    """Couple the number in each layer with the same axis of that layer."""
    kind = _kind(trials, own.node, spot.node)
    back = [n for n in _before(trials, own.node) if _kind(trials, own.node, n) == kind]
    for item in items:
        peers = [n for n in _before(trials, item.node) if _kind(trials, item.node, n) == kind]
        if len(peers) != len(back):
            continue
        peer = peers[back.index(spot.node)]
        tree, part = _tree(trials, replace(spot, node=peer)), item.part
        for factor in _beside(trials, item):
            if other is not None and factor.at == other.at:
                part = Product((factor.part, part))
        trials.scope.table.unify(tree, part)


def _beside(trials: Trials, item: Literal) -> list[Literal]:
    """List the other numbers that the operator receives."""
    return [o for o in trials.scope.literals if o.node is item.node and o.at != item.at]


def _kind(trials: Trials, node: Node, other: Node) -> tuple[Place, str]:
    """Identify an operator within a module, in the same way for every copy of the module."""
    module, inside = ((modules_of(n) or [""])[0] for n in (node, other))
    return trials.places[other], inside.removeprefix(module)


def _before(trials: Trials, node: Node) -> list[Node]:
    """List an operator and all earlier ones of its module and submodules, latest first."""
    module = (modules_of(node) or [""])[0]
    inside, last = trials.inside.get(module, []), trials.order[node]
    return [n for n in reversed(inside) if trials.order[n] <= last]


def _spots(trials: Trials, node: Node) -> Iterator[_Spot]:
    """List the earlier axes in an operator's module and submodules, latest first."""
    for peer in _before(trials, node):
        for operand in range(-1, len(peer.all_input_nodes)):
            if operand >= 0 or peer is not node:
                for i, value in enumerate(_values(trials, peer, operand)):
                    inside = range(len(value)) if isinstance(value, list) else ()
                    places = [(i, j) for j in inside] if isinstance(value, list) else [(i,)]
                    yield from (_Spot(peer, operand, at) for at in places)


def _values(trials: Trials, node: Node, operand: int) -> Result:
    return trials.scope.values.get(node if operand < 0 else node.all_input_nodes[operand], [])


def _tree(trials: Trials, spot: _Spot) -> Tree:
    value = value_at(_values(trials, spot.node, spot.operand), spot.at)
    return trials.scope.table.resolve(value)
