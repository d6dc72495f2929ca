"""The results of the trials of a model's code, and the places of operators in the code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Node

from intrafuse.graph.axes import Tree, leaves
from intrafuse.graph.rules import Literal, Scope, line_of, modules_of, operator_name
from intrafuse.graph.sizes.compare import Difference, calls
from intrafuse.graph.sizes.sizing import trial_sizes

__all__ = ["Key", "Number", "Place", "Trials", "value_at"]

# A place in the code: the line, or the node's name if unknown; the operator; how many of these
# operators the module ran there before.
Place = tuple[tuple[str, str] | str, str, int]
Key = tuple[str, str]  # the path of a module and the name of a number in it
Number = tuple[Place, tuple[int, ...]]  # a number at a place, with `Literal.at`


@dataclass
class Trials:
    """The results of the trials so far.

    Attributes:
        scope, nodes: the trace.
        attributes: (module, attribute) -> the tree that it follows.
        tried: number in the code -> the attributes that were tried for it.
        added: number in the code -> the keys that the last tried attribute added to `attributes`.
        holders: object that holds numbers -> the (module, attribute) that represents it.
        attempt: the number and the literals of the last tried attribute.
        failure: place and error of the last failure outside the operators of the trace.
        agreed: how many operators agreed in the last trial that failed; None if unknown.
        smaller: whether trials shrink sizes, as pruning does.
        reads: numbers that modules hold, (module, name) -> whether the code has read it.
    """

    scope: Scope
    nodes: list[Node]
    attributes: dict[Key, Tree] = field(default_factory=dict[Key, Tree])
    tried: dict[Number, list[str]] = field(default_factory=dict[Number, list[str]])
    added: dict[Number, list[Key]] = field(default_factory=dict[Number, list[Key]])
    holders: dict[int, Key] = field(default_factory=dict[int, Key])
    attempt: tuple[Number, list[Literal]] | None = None
    failure: str = ""
    agreed: int | None = None
    smaller: bool = False
    reads: dict[Key, bool] = field(default_factory=dict[Key, bool])
    _sizes: dict[tuple[int, ...], dict[int, int]] = field(
        default_factory=dict[tuple[int, ...], dict[int, int]]
    )

    def sizes(self, atoms: list[int]) -> dict[int, int]:
        """Choose sizes for a trial; the same atoms always get the same sizes."""
        table = self.scope.table
        key = (*atoms, len(table.size), self.smaller)
        if key not in self._sizes:
            met = self._met().values()
            self._sizes[key] = trial_sizes(table.size, atoms, met, smaller=self.smaller)
        return self._sizes[key]

    def _met(self) -> dict[str, frozenset[Tree]]:
        """List the axes of operands and results of each module's own operators."""
        found: dict[str, set[Tree]] = {}
        for node in self.nodes:
            for module in modules_of(node)[:1]:
                found.setdefault(module, set()).update(self._trees(node))
        return {module: frozenset(trees) for module, trees in found.items()}

    def _trees(self, node: Node) -> Iterator[Tree]:
        for operand in (node, *node.all_input_nodes):
            yield from map(self.scope.table.resolve, self.scope.trees(operand))

    @property
    def until(self) -> int | None:
        """How many operators include the one that failed last; None if unknown."""
        return None if self.agreed is None else self.agreed + 1

    def note(self, difference: Difference) -> None:
        """Note how many operators agreed before the first that differs."""
        if difference.explained:
            self.agreed = self.calls.index(difference.node)

    @cached_property
    def calls(self) -> list[Node]:
        """The operators of the trace except copies."""
        return calls(self.nodes)

    @cached_property
    def order(self) -> dict[Node, int]:
        """The position of each node in the trace."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def inside(self) -> dict[str, list[Node]]:
        """The operators of each module and its submodules, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.calls:
            for module in dict.fromkeys(modules_of(node)):
                found.setdefault(module, []).append(node)
        return found

    def forget(self, number: Number) -> None:
        """Undo the last tried attribute of a number."""
        for key in self.added.pop(number, ()):
            del self.attributes[key]

    def shared(self, path: str, name: str, holder: object) -> Key:
        """Return one (module, name) for a number in an object that several modules may share."""
        first = self.holders.setdefault(id(holder), (path, name.partition(".")[0]))
        return first[0], f"{first[1]}.{name.partition('.')[2]}"

    @cached_property
    def places(self) -> dict[Node, Place]:
        """The place of each operator in the code; equal for equal layers of different blocks."""
        count: Counter[tuple[object, ...]] = Counter()
        found: dict[Node, Place] = {}
        for node in self.nodes:
            place = (line_of(node) or node.name, operator_name(node))
            module = (*modules_of(node)[:1], *place)
            found[node] = (*place, count[module])
            count[module] += 1
        return found

    def at_stake(self, atoms: list[int]) -> list[Literal]:
        """List the literals whose axes hold any of the atoms."""
        wanted, resolve = set(atoms), self.scope.table.resolve
        items = self.scope.literals
        return [i for i in items if not wanted.isdisjoint(leaves(resolve(i.axis)))]


def value_at(values: Any, at: tuple[int, ...]) -> Tree:
    """Return the tree at a place in the axes of a result, or of several results."""
    for i in at:
        values = values[i]
    return values
