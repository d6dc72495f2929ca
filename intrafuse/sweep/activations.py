"""Run a traced network on batches of data, operator by operator, at its current tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from intrafuse.graph.export import CONSTANT, as_arguments, evaluating, export_program
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.program import Program
from intrafuse.graph.rules import operator_name
from intrafuse.graph.rules.registry import CHECKS
from intrafuse.support.batches import fitting
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.watch import FIT
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.following import Following, is_held, warn_unknown
from intrafuse.sweep.operators import Sizes, as_named, overwritten, run_operator, written

__all__ = ["Activations", "Batches"]

FORM = "give example inputs of the same form as the data"
Values = list[Any] | None  # one for each batch; None where the operator cannot be run
Shape = tuple[object, ...]
Twins = dict[Node, Node]  # each operator of a program in a trace at other shapes
TRACES = 64  # most traces of a program to remember
_TRACED: WeakKeyDictionary[Program, dict[Shape, Twins]] = WeakKeyDictionary()


class Batches:
    """Batches of inputs, and how the operators of a traced network read each.

    Args:
        model: the network.
        graph: its channel graph.
        inputs: batches: a tensor, a tuple of args or a mapping of kwargs.
        first: number of the first batch, in errors.

    Raises:
        IntrafuseError: the model refuses a batch, or runs other operators on it than on the
            example inputs.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, inputs: Sequence[Any], first: int = 1
    ) -> None:
        program, nodes = graph.program, graph.program.nodes
        entries = [n for n in nodes if n.op == "placeholder" and not is_held(program, n)]
        known = _TRACED.setdefault(program, {})  # a trace takes longer than to run the operators
        known[_form(program.example_inputs)[1]] = {node: node for node in nodes}
        self.nodes, self.first = nodes, first
        self.given: list[dict[Node, Any]] = []  # the inputs of each batch
        self.twins: list[Twins] = []  # the trace of such a batch
        for number, batch in enumerate(inputs, first):
            given, form = _form(batch)
            if form not in known:
                if len(known) >= TRACES:
                    del known[next(iter(known))]
                known[form] = _paired(nodes, _traced(model, batch, number), number)
            if len(given) != len(entries):
                raise IntrafuseError(
                    f"batch {number} of the data must have as many inputs as the example",
                    value=f"{len(given)}, not {len(entries)}",
                    remedy=FORM,
                )
            self.twins.append(known[form])
            self.given.append(dict(zip(entries, given, strict=True)))

    def __len__(self) -> int:
        return len(self.given)

    @cached_property
    def spoiled(self) -> frozenset[Node]:
        """The operators that cannot be run alone: a write through a view changes what they read."""
        return overwritten(self.nodes)


def _form(batch: Any) -> tuple[list[Any], Shape]:
    """List the inputs of a batch, and all that a trace depends on."""
    given, structure = tree_flatten(as_arguments(batch))
    shapes = (
        (tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in given
    )
    return given, (str(structure), *shapes)


def _traced(model: nn.Module, batch: Any, number: int) -> list[Node]:
    """List the operators that a model runs on a batch."""
    try:
        return [*export_program(model, batch).graph.nodes]
    except IntrafuseError:
        args, kwargs = as_arguments(batch)
        with fitting(f"batch {number} of the data", FIT), evaluating(model), torch.no_grad():
            model(*args, **kwargs)  # its own error says more than that of a trace
        raise


def _paired(nodes: Sequence[Node], traced: Sequence[Node], number: int) -> Twins:
    if [*map(_kind, nodes)] != [*map(_kind, traced)]:
        raise IntrafuseError(
            f"the model runs other operators on batch {number} of the data than on the example "
            "inputs",
            remedy=FORM,
        )
    return dict(zip(nodes, traced, strict=True))


def _kind(node: Node) -> str:
    return operator_name(node) if node.op == "call_function" else node.op


class Activations(Following[Values]):
    """The results of a network's operators on batches of data.

    A result is freed as soon as no operator needs it.

    Args:
        weights: the tensors, merged or not.
        batches: the data.
        pending, fixed: see `Following`.
    """

    writing = False  # operators that change what they read change a copy: results before them stay

    def __init__(
        self,
        weights: Weights,
        batches: Batches,
        pending: frozenset[str] = frozenset(),
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__(weights, pending, fixed=fixed)
        self.batches = batches
        self._sizes = Sizes(self.program, weights.graph.sizes, self.weights.sizes)

    def renewed(self, weights: Weights) -> Activations:
        """Return the results with other tensors, with nothing known."""
        return Activations(weights, self.batches, self.pending, fixed=self.fixed)

    def compute(self, node: Node) -> Values:
        """Run an operator on every batch."""
        if node.op == "placeholder":
            return [given.get(node) for given in self.batches.given]
        if node.op != "call_function":
            return None
        if operator_name(node) in CHECKS:
            return [None] * len(self.batches)
        if any(self._known[source] is None for source in self.sources(node)):
            return None
        try:
            if not self.writing and node in self.batches.spoiled:
                raise ValueError("another operator writes into a part of what it reads")
            with torch.no_grad():
                return [self._run(node, i) for i in range(len(self.batches))]
        except IntrafuseError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # fmt: skip
            warn_unknown(node, "{} cannot be run alone", error)
            return None

    def computed(self, node: Node) -> None:
        """Free what the operator was the last to need: results of data are large."""
        self.free(self.sources(node))

    def _run(self, node: Node, batch: int) -> Any:
        twins = self.batches.twins[batch]
        twin = twins[node]
        back = dict(zip(twin.all_input_nodes, node.all_input_nodes, strict=True))
        named = as_named(twin, lambda read: self._value(back[read], read, batch))
        if named.get("bias", 0) is None:  # a merge may have made a bias
            layer = self.weights.graph.layers.get(self.program.parameter(node.args[1]))
            named["bias"] = self.weights.state.get((layer and layer.bias) or "")
        first = written(twin)
        if first is not None and not self.writing:
            named[first] = named[first].clone()
        if self.fixed:
            with fitting(f"batch {batch + self.batches.first} of the data", FIT):
                return run_operator(node, twin, named, self._sizes)
        result = run_operator(node, twin, named, self._sizes)
        if isinstance(result, Tensor):
            wanted = self._sizes.shape(node, twin)
            if [*result.shape] != wanted:
                raise ValueError(f"the shape {wanted} was expected, not {[*result.shape]}")
        return result

    def _value(self, node: Node, twin: Node, batch: int) -> Any:
        name = self.program.parameters.get(node)
        if name is not None:
            return self.weights.state[name]
        if CONSTANT in twin.meta:
            return twin.meta[CONSTANT]
        values = self._known[node]
        assert values is not None
        return values[batch]
