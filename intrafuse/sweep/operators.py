"""Run one traced operator at other sizes than those in its arguments.

A trace holds sizes as numbers: `view(x, [2, 512])`. Each number that belongs to an axis of the
channel graph follows from the tree of that axis; all others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from intrafuse.graph.axes import UNIT, Tree, tree_size
from intrafuse.graph.program import Program
from intrafuse.graph.rules import arguments, entering, operator_name
from intrafuse.graph.rules.registry import SPLITS
from intrafuse.graph.rules.shape import slice_range

__all__ = ["Sizes", "as_named", "overwritten", "run_operator", "written"]


class Sizes:
    """The lengths of axes now, beside those in a trace.

    Args:
        program: the traced program.
        traced: the size of every atom in the trace.
        now: its current size.
    """

    def __init__(self, program: Program, traced: Mapping[int, int], now: Mapping[int, int]) -> None:
        self.program, self.traced, self.now = program, traced, now
        self.same = all(now[atom] == size for atom, size in traced.items() if atom in now)

    def follow(self, number: int, tree: Tree) -> int:
        """Return what a number that belongs to an axis is now."""
        return number * tree_size(tree, self.now) // max(1, tree_size(tree, self.traced))

    def shape(self, node: Node, twin: Node) -> list[int]:
        """Return the current shape of a result, whose traced shape the twin holds."""
        trees = self.program.values[node]
        return [self.follow(int(n), t) for n, t in zip(twin.meta["val"].shape, trees, strict=True)]


def run_operator(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> Any:
    """Run an operator on actual arguments.

    Args:
        node: the operator in the traced program, whose trees are known.
        twin: the same operator in a trace at the shapes of the data.
        named: its arguments by name, with tensors instead of nodes, and the numbers of the twin.
        sizes: current lengths of axes.
    """
    if not sizes.same:
        change = RESIZED.get(operator_name(node))
        if change is not None:
            change(node, twin, named, sizes)
        _follow_scale(node, named, sizes)
    target: Any = twin.target
    if target is getitem:
        return named["self"][named["index"]]
    positional = [named.pop(a.name) for a in target._schema.arguments if not a.kwarg_only]
    return target(*positional, **named)


def _follow_scale(node: Node, named: dict[str, Any], sizes: Sizes) -> None:
    tree, exponent = sizes.program.scales.get(node, (UNIT, 0.0))
    ratio = (tree_size(tree, sizes.now) / tree_size(tree, sizes.traced)) ** exponent
    if ratio != 1:
        given = {a.name for a, _ in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
        for name, value in named.items():
            own = name in given or name in node.kwargs
            if own and isinstance(value, int | float) and not isinstance(value, bool):
                named[name] = value * ratio


Change = Callable[[Node, Node, dict[str, Any], Sizes], None]
RESIZED: dict[str, Change] = {}


def _register(*operators: str) -> Callable[[Change], Change]:
    return entering(RESIZED, operators, "change of sizes")


@_register("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "full",
           "empty", "new_zeros", "new_ones", "new_full", "new_empty")  # fmt: skip
def _whole(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    named["shape" if "shape" in named else "size"] = sizes.shape(node, twin)


@_register("unflatten")
def _unflatten(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    shape = sizes.shape(node, twin)
    first = named["dim"] % named["self"].dim()
    named["sizes"] = shape[first : first + len(named["sizes"])]


@_register("slice", "narrow")
def _slice(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    source, program = twin.all_input_nodes[0], sizes.program
    dim = named["dim"] % named["self"].dim()
    start, _, step = slice_range(twin, int(source.meta["val"].shape[dim]))
    if node in program.starts:
        start = tree_size(program.starts[node], sizes.now)
    length = sizes.shape(node, twin)[dim]
    named["start"] = start
    if "length" in named:
        named["length"] = length
    else:
        named["end"] = start + length * step


@_register(*sorted(SPLITS - {"chunk"}))
def _split(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    dim = named["dim"] % named["self"].dim()
    trees = sizes.program.values[node]
    old = [int(value.shape[dim]) for value in twin.meta["val"]]
    parts = [sizes.follow(n, tree[dim]) for n, tree in zip(old, trees, strict=True)]
    if "split_sizes" in named:
        named["split_sizes"] = parts
    elif "split_size" in named:
        whole = isinstance(named["split_size"], int)
        named["split_size"] = max(parts) if whole else parts
    elif "indices" in named:
        named["indices"] = [sum(parts[: i + 1]) for i in range(len(parts) - 1)]


@_register("layer_norm", "rms_norm")
def _normalized(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    given = next(named[name] for name in ("input", "self") if name in named)
    named["normalized_shape"] = list(given.shape[-len(named["normalized_shape"]) :])


@_register("conv1d", "conv2d", "conv3d")
def _convolution(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    weight: Tensor = named["weight"]
    named["groups"] = named["input"].shape[1 - weight.dim()] // weight.shape[1]


@_register("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    weight: Tensor = named["weight"]
    named["groups"] = sizes.shape(node, twin)[1 - weight.dim()] // weight.shape[1]


@_register("group_norm")
def _grouped(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    channels = sizes.program.values[node][1]
    whole = [f for f in getattr(channels, "factors", ()) if tree_size(f, sizes.traced) > 1]
    if whole and tree_size(whole[0], sizes.traced) == named["num_groups"]:
        named["num_groups"] = tree_size(whole[0], sizes.now)


@_register("repeat", "tile")
def _repeat(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    name = "repeats" if "repeats" in named else "dims"
    shape = sizes.shape(node, twin)
    given = [1] * (len(shape) - named["self"].dim()) + [*named["self"].shape]
    named[name] = [n // m for n, m in zip(shape, given, strict=True)]


@_register("repeat_interleave")
def _interleave(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    if isinstance(named.get("repeats"), int) and named.get("dim") is not None:
        dim = named["dim"] % named["self"].dim()
        named["repeats"] = sizes.shape(node, twin)[dim] // named["self"].shape[dim]
        named["output_size"] = None


@_register("arange")
def _arange(node: Node, twin: Node, named: dict[str, Any], sizes: Sizes) -> None:
    (length,) = sizes.shape(node, twin)
    if length != twin.meta["val"].shape[0]:
        named["end"] = named.get("start", 0) + length * named.get("step", 1)


def written(node: Node) -> str | None:
    """Name the argument that an operator writes its result into; None if it makes a new tensor."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.endswith("_") or schema.name.endswith("__"):
        return None
    return schema.arguments[0].name


def overwritten(nodes: Sequence[Node]) -> frozenset[Node]:
    """List the operators that read a tensor after another operator wrote into it through a view."""
    roots: dict[Node, Node] = {}  # the tensor that each result is a view of
    spoiled: set[Node] = set()
    found: set[Node] = set()
    for node in nodes:
        source = next(iter(node.all_input_nodes), node)
        writes = written(node) is not None
        roots[node] = roots.get(source, source) if writes or _is_view(node) else node
        if not spoiled.isdisjoint(node.all_input_nodes):
            found.add(node)
        if writes:
            same = (n for n, root in roots.items() if root is roots[node])
            spoiled.update(n for n in same if n not in (source, node))
    return frozenset(found)


def _is_view(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return node.target is getitem or any(one.alias_info is not None for one in returns)


def as_named(twin: Node, values: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name, with `values(node)` in place of nodes."""
    if twin.target is getitem:
        source, index = twin.args
        return {"self": values(source), "index": index}
    return {name: map_arg(value, values) for name, value in arguments(twin).items()}
