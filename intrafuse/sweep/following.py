"""What is known of each operator's result, while the tensors of a network change.

A pass that merges the groups of a network from input to output asks again and again for what the
readers receive. A change reaches only the operators behind it, so everything else stays known, and
each operator is computed a few times instead of once for each group.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Generic, Self, TypeVar

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from intrafuse.graph.axes import UNIT, leaves
from intrafuse.graph.export import CONSTANT
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.program import Program
from intrafuse.graph.rules import location, operator_name
from intrafuse.surgery.weights import Weights

__all__ = ["Following", "is_held", "warn_unknown", "weight_read"]

Value = TypeVar("Value")


class Following(ABC, Generic[Value]):
    """The results of a network's operators, computed on demand.

    A result may be freed when all operators that read it have run, and none of them will run
    again: no pending group holds channels in it, or in an operator before it.

    Args:
        weights: the tensors.
        pending: names of the groups that are still to be merged.
        fixed: whether the tensors stay as they are while groups are merged elsewhere, as those of
            the original network. Then only what operators of pending groups read is kept.
    """

    def __init__(
        self, weights: Weights, pending: frozenset[str] = frozenset(), *, fixed: bool = False
    ) -> None:
        self.weights = weights.snapshot()
        self.program = weights.graph.program
        self.pending, self.fixed = pending, fixed
        self._settled: dict[Node, bool] = {}
        self._known: dict[Node, Value] = {}
        self._freed: set[Node] = set()  # known once, and needed no more
        self._dependents: _Dependents | None = None
        self._tried_from: Self | None = None
        self._differing: set[Node] = set()  # operators that are not as where they are tried from

    @abstractmethod
    def compute(self, node: Node) -> Value:
        """Compute the result of an operator, whose sources are known."""

    @abstractmethod
    def renewed(self, weights: Weights) -> Self:
        """Return the same for other tensors, with nothing known."""

    def at(self, weights: Weights) -> Self:
        """Return the same for other tensors of the graph; what their change does not reach stays.

        Tensors count as changed if they are other objects.
        """
        other = self.renewed(weights)
        other._dependents = self._index
        other._known, other._freed = dict(self._known), set(self._freed)
        stack = self._index.of_change(self.weights, other.weights)
        other._differing = set(stack)
        while stack:  # the users of a result that was never known were not known either
            node = stack.pop()
            if node in other._known or node in other._freed:
                other._known.pop(node, None)
                other._freed.discard(node)
                stack.extend(node.users)
                other._differing.update(node.users)
        return other

    def until(self, weights: Weights, pending: frozenset[str]) -> Self:
        """Return the same as `at`, when fewer groups are pending; free what they do not need."""
        other = self.at(weights)
        other.pending = pending
        if pending <= self.pending:  # what is settled stays so
            other._settled = {node: True for node, settled in self._settled.items() if settled}
        other.free([*other._known])
        return other

    def trying(self, weights: Weights) -> Self:
        """Return the same as `at`, for tensors that are only tried.

        What their change does not reach is computed and kept here.
        """
        other = self.at(weights)
        other._tried_from, other.pending = self, frozenset()  # it will not change
        return other

    def of(self, node: Node) -> Value:
        """Return the result of an operator."""
        for top in _missing(node, self._known, self.sources):
            self._known[top] = self._here_or_there(top)
            self._freed.discard(top)
            self.computed(top)
        return self._known[node]

    def computed(self, node: Node) -> None:
        """Is called after an operator was computed."""

    def sources(self, node: Node) -> list[Node]:
        """List the operators whose results a node reads."""
        if node.op != "call_function":
            return []
        return [n for n in node.all_input_nodes if not is_held(self.program, n)]

    @property
    def calls(self) -> dict[str, list[Node]]:
        """The operators that call each convolution or linear map, by the name of its weight."""
        return self._index.calls

    @property
    def _index(self) -> _Dependents:
        """Who reads what, which is the same for all tensors."""
        self._dependents = self._dependents or _Dependents(self.weights.graph)
        return self._dependents

    def free(self, nodes: Iterable[Node]) -> None:
        """Free the results of those operators that nothing needs any more."""
        for node in nodes:
            if node not in self._known or node.op == "placeholder":
                continue
            known = (user in self._known or user in self._freed for user in node.users)
            if all(known) and all(map(self._is_settled, node.users)):
                del self._known[node]
                self._freed.add(node)

    def _is_settled(self, node: Node) -> bool:
        """Tell whether an operator will not run again, because no pending group reaches it."""

        def before(top: Node) -> list[Node]:
            return [] if self.fixed else self.sources(top)

        for top in _missing(node, self._settled, before):
            read = {self.program.parameters.get(n) for n in top.all_input_nodes}
            own = self._holders.isdisjoint(read)
            self._settled[top] = own and all(self._settled[n] for n in before(top))
        return self._settled[node]

    @cached_property
    def _holders(self) -> frozenset[str]:
        """The parameters that hold channels of pending groups."""
        groups = (self.weights.graph.by_name[name] for name in self.pending)
        return frozenset(slot.parameter for group in groups for slot in group.slots)

    def _here_or_there(self, node: Node) -> Value:
        if self._tried_from is not None:
            if node not in self._differing and self._differing.isdisjoint(self.sources(node)):
                return self._tried_from.of(node)
            self._differing.add(node)
        return self.compute(node)


def is_held(program: Program, node: Node) -> bool:
    """Tell whether a node stands for a parameter, a buffer or a constant."""
    return node in program.parameters or CONSTANT in node.meta


def weight_read(program: Program, node: Node) -> str:
    """Name the weight that a convolution or linear map reads; "" for other operators."""
    known = node.op == "call_function" and operator_name(node).startswith(("conv", "linear"))
    return program.parameter(node.args[1]) if known else ""


def warn_unknown(node: Node, what: str, error: Exception) -> None:
    """Warn that a result stays unknown because of an error, which does not stop pruning.

    Args:
        node: the operator.
        what: says what failed; `{}` stands for the operator and its line.
        error: the error.
    """
    at = location(node)
    where = f"operator {operator_name(node)}{f' at {at}' if at else ''}"
    warnings.warn(
        f"the {what.format(where)} ({type(error).__name__}: {error}): the readers of its result "
        "keep the weights of pruning without moments",
        RuntimeWarning,
        stacklevel=3,
    )


def _missing(
    node: Node, known: Container[Node], sources: Callable[[Node], list[Node]]
) -> Iterator[Node]:
    """List a node and what it needs that is not known, each after its sources.

    The caller makes each known before it takes the next. No recursion: networks may be thousands
    of operators deep.
    """
    stack = [node]
    while stack:
        top = stack[-1]
        waiting = [] if top in known else [n for n in sources(top) if n not in known]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if top not in known:
            yield top


class _Dependents:
    """Which operators read each tensor and each size, and which call each layer."""

    def __init__(self, graph: ChannelGraph) -> None:
        program = graph.program
        self.tensors: dict[str, list[Node]] = {}
        self.sizes: dict[int, list[Node]] = {}
        self.calls: dict[str, list[Node]] = {}
        biases = {layer.weight: layer.bias for layer in graph.layers.values() if layer.bias}
        for node in program.nodes:
            inputs = node.all_input_nodes
            if weight := weight_read(program, node):
                self.calls.setdefault(weight, []).append(node)
            names = {program.parameters[n] for n in inputs if n in program.parameters}
            for name in {*names, *(biases[n] for n in names if n in biases)}:
                self.tensors.setdefault(name, []).append(node)
            trees = tree_leaves([program.values.get(n, []) for n in (node, *inputs)])
            trees += [program.scales.get(node, (UNIT, 0.0))[0], program.starts.get(node, UNIT)]
            for atom in {atom for tree in trees for atom in leaves(tree)}:
                self.sizes.setdefault(atom, []).append(node)

    def of_change(self, old: Weights, new: Weights) -> list[Node]:
        """List the operators that read anything that differs."""
        changed = _differing(old.held, new.held)
        for part in (0, 1):  # means and deviations
            told = [{k: s[part] for k, s in w.statistics.items()} for w in (old, new)]
            changed |= _differing(*told)
        found: list[Node] = []
        for name in changed:
            found += self.tensors.get(name, [])
        for atom, size in new.sizes.items():
            if size != old.sizes[atom]:
                found += self.sizes.get(atom, [])
        return found


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Name the entries of two mappings that are not the same objects."""
    return {name for name in {*old, *new} if old.get(name) is not new.get(name)}
