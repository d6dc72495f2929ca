"""Rules for recurrent layers: LSTM, GRU and plain RNN, as layers and as cells.

The rows of the weights hold the gates one after the other. All gates of a unit are removed
together. All layers and directions of one module share its attribute `hidden_size`, so they keep
the same units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from intrafuse.graph.axes import Sum, Tree
from intrafuse.graph.rules.registry import Axes, LockError, Scope, operator_name, register
from intrafuse.graph.typed import is_several

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class _Units:
    """The axes that all layers and directions of one recurrent module share."""

    hidden: Tree
    output: Tree  # outputs of one direction: the hidden units or their projection
    rows: Tree  # the gates of all hidden units


def _units(scope: Scope, node: Node, weights: list[Node], projected: bool) -> _Units:
    """Make the axes that all layers and directions share."""
    last = weights[-1] if projected else weights[1]
    hidden = scope.table.atom(scope.shape(last)[1])
    output = scope.table.atom(scope.shape(last)[0]) if projected else hidden
    gates = GATES[operator_name(node).partition("_")[0]]
    return _Units(hidden, output, Sum((hidden,) * gates))


def _direction(
    scope: Scope, node: Node, weights: list[Node], x: Tree, units: _Units, steps: float
) -> None:
    """Couple one direction of one layer: weight_ih, weight_hh, 0 or 2 biases, projection."""
    projection = [(units.output, units.hidden)] if len(weights) % 2 else []
    biases = len(weights) - 2 - len(projection)
    sides = [(units.rows, x), (units.rows, units.output), *[(units.rows,)] * biases, *projection]
    for weight, axes in zip(weights, sides, strict=True):
        name = scope.parameter(weight, "weight")
        scope.unify(scope.axes(weight), axes)
        scope.use(name, 0, "writer", "weight" if len(axes) == 2 else "bias")
        if len(axes) == 2:
            scope.use(name, 1, "reader", "weight")
            scope.cost(node, name, steps, *scope.axes(weight))


@register("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(scope: Scope, node: Node) -> list[Axes]:
    """Run over a sequence in one or more layers, in one or both directions."""
    args = scope.arguments(node)
    if "batch_sizes" in args:
        raise LockError("samples of a packed sequence differ in length")
    weights, x = list(args["params"]), scope.axes(args["input"])
    time = 1 if args["batch_first"] else 0
    scope.table.lock(x[time], "positions of a sequence")
    directions = 2 if args["bidirectional"] else 1
    each = len(weights) // (args["num_layers"] * directions)
    units = _units(scope, node, weights[:each], bool(each % 2))
    owner = scope.parameter(weights[0], "weight")
    scope.attribute(owner, "hidden_size", units.hidden, needed=True)
    scope.attribute(owner, "input_size", x[2], needed=True)
    if each % 2:
        scope.attribute(owner, "proj_size", units.output, needed=True)
        scope.table.lock(
            units.hidden,
            "an LSTM with projections must have more units than these, and those may go",
        )
    steps = scope.positions(args["input"], scope.table.measure(x[2]))
    joined = scope.table.resolve(Sum((units.output,) * directions))
    for start in range(0, len(weights), each):
        source = x[2] if start < each * directions else joined
        _direction(scope, node, weights[start : start + each], source, units, steps)
    lstm = operator_name(node) == "lstm"
    ends = [units.output, units.hidden] if lstm else [units.output]
    _enter_states(scope, args["hx"] if lstm else [args["hx"]], x[1 - time], ends)
    states = [
        [scope.fixed(args["num_layers"] * directions, "layers of a recurrent module"), batch, end]
        for batch, end in ((x[1 - time], end) for end in ends)
    ]
    return [[*x[:2], scope.table.resolve(joined)], *states]


def _enter_states(scope: Scope, states: Sequence[Node], batch: Tree, ends: Sequence[Tree]) -> None:
    """Couple initial states with the units of their ends."""
    for state, end in zip(states, ends, strict=True):
        scope.carry(state, "shift")  # a learned initial state
        *layers, samples, units = scope.axes(state)
        for tree in layers:
            scope.table.lock(tree, "layers of a recurrent module")
        scope.unify([samples, units], [batch, end])


@register("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Take one step of a sequence."""
    args = scope.arguments(node)
    weights = [args[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if args[name] is not None]
    batch, x = scope.axes(args["input"])
    units = _units(scope, node, weights, False)
    owner = scope.parameter(weights[0], "weight")
    scope.attribute(owner, "hidden_size", units.hidden)
    scope.attribute(owner, "input_size", x)
    steps = scope.positions(args["input"], scope.table.measure(x))
    _direction(scope, node, weights, x, units, steps)
    states: Sequence[Node] = args["hx"] if is_several(args["hx"]) else [args["hx"]]
    _enter_states(scope, states, batch, [units.hidden] * len(states))
    result = [batch, scope.table.resolve(units.hidden)]
    return [result, result] if len(states) == 2 else result
