"""Compare a resized network with its channel graph, operator by operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose

from torch import Tensor
from torch.fx import Graph, Node

from intrafuse.graph.axes import Tree, tree_size
from intrafuse.graph.export import CONSTANT
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.pointwise import BINARY, UNARY
from intrafuse.graph.rules.registry import CHECKS, LIFTS, SAME, Result
from intrafuse.graph.rules.shape import slice_range
from intrafuse.graph.typed import is_several

__all__ = [
    "Difference",
    "Expected",
    "Following",
    "Stop",
    "calls",
    "difference",
    "first_difference",
    "is_call",
    "numbers",
]

Shape = list[int | list[int]]  # the sizes of a result, or those of each of several results

NUMERIC = frozenset(
    (*UNARY, *BINARY, "scaled_dot_product_attention", "baddbmm", "addmm", "full", "scalar_tensor")
)
IDLE = SAME | CHECKS | {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}


@dataclass(frozen=True)
class Difference:
    """The first operator that differs from the expectation.

    Attributes:
        node: the operator of the traced network.
        rule: the expectation in words.
        value: the observed value.
        expected: the expected shape, if the shape differs.
        numbers: the observed numbers, if the numbers differ.
        start: the observed start of a slice, if the start differs.
        failed: the operator that failed, with its arguments.
    """

    node: Node
    rule: str
    value: object
    expected: Shape | None = None
    numbers: tuple[float, ...] | None = None
    start: int | None = None
    failed: Node | None = None

    @property
    def explained(self) -> bool:
        """Whether a shape, number or start differs, rather than the operator or an error."""
        return not (self.expected is None and self.numbers is None and self.start is None)


@dataclass(frozen=True)
class Expected:
    """The expected results of operators at any sizes.

    Attributes:
        nodes: the traced operators.
        values: the trees of each result.
        scales: numbers that follow a size: operator -> (tree of the size, exponent).
        starts: slice -> tree of the positions before it.
        sizes: the traced size of every atom.
    """

    nodes: Iterable[Node]
    values: Mapping[Node, Result]
    scales: Mapping[Node, tuple[Tree, float]]
    starts: Mapping[Node, Tree]
    sizes: Mapping[int, int]


def calls(nodes: Iterable[Node]) -> list[Node]:
    """List the operators of a graph except copies, which an export may drop."""
    return [n for n in nodes if is_call(n)]


def is_call(node: Node) -> bool:
    """Tell whether a node is an operator other than a copy."""
    return node.op == "call_function" and operator_name(node) not in IDLE


def numbers(node: Node) -> tuple[float, ...]:
    """List the numbers that an operator receives, including those of a constant tensor."""
    if operator_name(node) in LIFTS:
        constant = node.all_input_nodes[0].meta.get(CONSTANT)
        if constant is None or constant.is_meta or constant.is_complex():
            return ()
        return tuple(constant.double().nan_to_num(0.0).flatten().tolist())
    return tuple(
        float(a) for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float)
    )


def first_difference(
    expected: Expected, new: Iterable[Node], sizes: Mapping[int, int], *, whole: bool = True
) -> Difference | None:
    """Find the first operator whose kind, shape, numbers or start differ from the expectation.

    Args:
        expected: the results of the traced network, by sizes.
        new: the operators of the resized network.
        sizes: the size of every atom in the resized network.
        whole: whether the resized network ran to its end; if not, compare only sizes and numbers.
    """
    first, second = calls(expected.nodes), calls(new)
    for node, now in zip(first, second, strict=False):
        different = difference(expected, node, now, sizes)
        if different is not None:
            return different if whole or different.explained else None
    if whole and len(first) != len(second):
        return Difference((first or second)[-1], f"is one of {len(first)} operators", len(second))
    return None


def difference(
    expected: Expected, node: Node, now: Node, sizes: Mapping[int, int]
) -> Difference | None:
    """Compare an operator of the resized network with the traced one."""
    if operator_name(node) != operator_name(now):
        return Difference(node, "runs another operator", operator_name(now))
    right, shape = _sizes_of(expected.values[node], sizes), _shape(now.meta.get("val"))
    if shape is not None and shape != right:
        return Difference(node, f"should return {right}", shape, right)
    return _other_numbers(expected, node, now, sizes) or _elsewhere(expected, node, now, sizes)


class Stop(Exception):
    """Raised to stop a model once a trial has shown enough.

    Attributes:
        difference: the first operator that differs, if any did.
    """

    def __init__(self, difference: Difference | None) -> None:
        super().__init__()
        self.difference = difference


class Following:
    """Compares the operators of a resized network with the trace while the network runs.

    A call raises `Stop` at the first shape, number or start that differs, or after `until`
    operators (None: never). If another operator runs, the comparison is left to the end.
    """

    def __init__(self, expected: Expected, sizes: Mapping[int, int], until: int | None) -> None:
        self.expected = expected
        self.sizes = sizes
        self.until = until
        self.traced = iter(calls(expected.nodes))
        self.agreed = 0
        self.last: Node | None = None

    def __call__(self, graph: Graph) -> None:
        """Compare the operators that are new in the graph."""
        new = next(iter(graph.nodes)) if self.last is None else self.last.next
        while new.op != "root":
            self.last = new
            if is_call(new):
                self._compare(new)
            new = new.next

    def _compare(self, now: Node) -> None:
        node = next(self.traced, None)
        if node is None:
            return
        different = difference(self.expected, node, now, self.sizes)
        if different is not None:
            self.traced = iter(())
            if different.explained:
                raise Stop(different)
            return
        self.agreed += 1
        if self.agreed == self.until:
            raise Stop(None)


def _other_numbers(
    expected: Expected, node: Node, now: Node, sizes: Mapping[int, int]
) -> Difference | None:
    """Return the difference if an operator computes with unexpected numbers."""
    if operator_name(node) not in NUMERIC:
        return None
    wanted, given = numbers(node), numbers(now)
    if node in expected.scales:
        tree, exponent = expected.scales[node]
        ratio = (tree_size(tree, sizes) / tree_size(tree, expected.sizes)) ** exponent
        wanted = tuple(number * ratio for number in wanted)
    if len(wanted) == len(given) and all(
        a == b or isclose(a, b, rel_tol=1e-9) for a, b in zip(wanted, given, strict=True)
    ):
        return None
    return Difference(node, f"computes with {[*wanted]}", [*given], numbers=given)


def _elsewhere(
    expected: Expected, node: Node, now: Node, sizes: Mapping[int, int]
) -> Difference | None:
    """Return the difference if a slice has an unexpected start or step."""
    if operator_name(node) not in ("slice", "narrow"):
        return None
    old, given = _range(node), _range(now)
    if old is None or given is None:
        return None
    start = tree_size(expected.starts[node], sizes) if node in expected.starts else old[0]
    if (start, old[1]) == given:
        return None
    rule = (
        f"should begin at {start} and take every {old[1]}"
        if old[1] > 1
        else f"should begin at {start}"
    )
    return Difference(node, rule, given[0], start=given[0])


def _range(node: Node) -> tuple[int, int] | None:
    """Return start and step of a slice; None if they are not numbers."""
    args = arguments(node)
    shape = node.all_input_nodes[0].meta["val"].shape
    if not all(a is None or isinstance(a, int) for k, a in args.items() if k != "self"):
        return None
    start, _, step = slice_range(node, int(shape[args["dim"]]))
    return start, step


def _sizes_of(result: Result, sizes: Mapping[int, int]) -> Shape:
    """Compute the shape of a result, or of each of several results."""
    return [
        [tree_size(tree, sizes) for tree in item]
        if isinstance(item, list)
        else tree_size(item, sizes)
        for item in result
    ]


def _shape(value: object) -> Shape | None:
    """Return the shape of a result, or of each of several results; None without a shape."""
    if isinstance(value, Tensor):
        return [int(n) for n in value.shape]
    if is_several(value) and all(isinstance(item, Tensor) for item in value):
        return [[int(n) for n in item.shape] for item in value]
    return None
