"""Walk through networks on data, and see what their layers and norms receive or return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node

from intrafuse.graph.export import ExampleInputs, evaluating
from intrafuse.graph.program import Program
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.support.sums import Sums
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations, Batches
from intrafuse.sweep.following import weight_read
from intrafuse.sweep.operators import written

__all__ = ["measure", "walk"]

See = Callable[..., Tensor | None]


class _Pass(Activations):
    """The results on one batch while all operators run in order, each once."""

    writing = True

    def run(self, node: Node) -> None:
        """Run the next operator."""
        self._known[node] = self.compute(node)

    def replace(self, node: Node, result: Tensor | None) -> None:
        """Let the operators behind read another result, unless it is None."""
        if result is not None:
            self._known[node] = [result]

    def drop(self, nodes: Iterable[Node]) -> None:
        """Free results."""
        for node in nodes:
            del self._known[node]


def walk(
    model: nn.Module,
    networks: Sequence[Weights],
    inputs: Iterable[ExampleInputs],
    seen: Mapping[str, See],
    *,
    before: bool = False,
) -> int:
    """Run networks on batches, side by side, and show what their layers and norms compute.

    Each operator runs in all networks before the next one; a result is freed when no later operator
    reads it. Nothing remains of a batch when the next one is read.

    Args:
        model: the module that was traced.
        networks: the tensors of networks of its graph, merged or not; they are not changed.
        inputs: batches: a tensor, a tuple of args or a mapping of kwargs.
        seen: functions by the name of a weight, or of a batch norm's running mean. Each is called
            with the outputs of a convolution, linear map or norm in all networks. A tensor that it
            returns replaces the output in the first network.
        before: call the functions with the inputs of layers and norms instead.

    Returns:
        The number of batches.

    Raises:
        IntrafuseError: the model refuses a batch, or runs other operators on it than on the
            example inputs.
    """
    graph, count = networks[0].graph, 0
    nodes = graph.program.nodes
    watched = {node: seen[name] for node in nodes if (name := _name(graph.program, node)) in seen}
    last = {source: node for node in nodes for source in (node, *node.all_input_nodes)}
    over: dict[Node, list[Node]] = {}
    for source, node in last.items():
        over.setdefault(node, []).append(source)
    if any(map(written, nodes)):  # perhaps into a buffer, which keeps it from batch to batch
        networks = [weights.moved(torch.clone) for weights in networks]
    with evaluating(model), torch.no_grad():
        for count, batch in enumerate(inputs, 1):
            passes = [
                _Pass(weights, Batches(model, graph, [batch], count), fixed=True)
                for weights in networks
            ]
            for node in nodes:
                if before and node in watched:
                    _show(watched[node], passes, node.all_input_nodes[0])
                for one in passes:
                    one.run(node)
                if node in watched and not before:
                    passes[0].replace(node, _show(watched[node], passes, node))
                for one in passes:
                    one.drop(over.get(node, ()))
    return count


def measure(
    model: nn.Module,
    weights: Weights,
    inputs: Iterable[ExampleInputs],
    ordered: Mapping[str, Callable[[Tensor], Tensor]],
) -> tuple[dict[str, Sums], int]:
    """Sum the channels of outputs, for means and variances.

    Args:
        model, inputs: as for `walk`.
        weights: the tensors of the network.
        ordered: functions that order an output as (samples, channels), by names as for `walk`.

    Returns:
        Sums by name, without what never ran, and the number of batches.
    """
    sums: dict[str, Sums] = {}

    def add(name: str, output: Tensor) -> None:
        sums.setdefault(name, Sums()).add(ordered[name](output))

    batches = walk(model, [weights], inputs, {name: partial(add, name) for name in ordered})
    return sums, batches


def _name(program: Program, node: Node) -> str:
    """Name the weight of a convolution or linear map, or the running mean of a batch norm."""
    name = operator_name(node) if node.op == "call_function" else ""
    if "batch_norm" in name:
        return program.parameter(arguments(node)["running_mean"])
    return weight_read(program, node)


def _show(see: See, passes: Sequence[_Pass], node: Node) -> Tensor | None:
    """Show a result to a function, unless it is unknown."""
    results = [one.of(node) for one in passes]
    return see(*(values[0] for values in results if values)) if all(results) else None
