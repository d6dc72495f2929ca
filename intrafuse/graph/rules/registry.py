"""The registry of operator rules, and the scope that gives a rule access to one trace.

A rule is a function ``rule(scope, node) -> axes``. It unifies equal axes in `Scope.table`, records
the roles of parameters, and returns the axes of the operator's result: a list of trees, or a list
of such lists for an operator with several results. Operators have their ATen names, without
overload and trailing underscore: `conv2d`, `add`, `relu`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Node

from intrafuse.graph.axes import AxisTable, Tree, leaves
from intrafuse.graph.groups import Attribute, Cost, Hint, Kind, Layer, Norm, Rescale, Role
from intrafuse.support.modules import held_size

__all__ = [
    "RULES",
    "START",
    "Literal",
    "LockError",
    "Scope",
    "arguments",
    "compute",
    "entering",
    "line_of",
    "location",
    "modules_of",
    "operator_name",
    "register",
]

Axes = list[Tree]
Result = Sequence[Tree | Axes]  # the axes of a tensor, or those of each of several tensors

# Operators that move values and change none, by what they do. Who asks whether an operator only
# moves values takes the answer from this table.
PERMUTATIONS = frozenset(  # order dimensions anew
    "permute transpose t swapaxes swapdims numpy_T mT mH matrix_H adjoint movedim moveaxis".split()
)
SAME = frozenset("contiguous alias detach".split())  # an export may write them or not
CASTS = SAME | frozenset(  # change nothing but the type
    "to _to_copy float double half bfloat16 type_as clone positive".split()
)
LIFTS = frozenset(("lift_fresh_copy", "lift_fresh"))  # make a tensor of numbers in the code
SHAPES = frozenset(  # give the same elements, in the same order, other dimensions
    "unsqueeze squeeze view view_as reshape reshape_as _unsafe_view flatten unflatten".split()
)
REPEATS = frozenset("expand expand_as broadcast_to repeat".split())  # give elements several times
CUTS = frozenset(("slice", "narrow", "select"))  # give a part
SPLITS = frozenset("chunk split split_with_sizes unsafe_split tensor_split".split())  # all parts
JOINS = frozenset(("cat", "concat", "concatenate"))  # put parts one after the other
DROPOUTS = frozenset(  # give what they take, in evaluation mode
    "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout".split()
)
RESHAPES = SHAPES | REPEATS
VIEWS = PERMUTATIONS | CASTS | RESHAPES | CUTS

CHECKS = frozenset(("_assert_tensor_metadata",))  # operators without a result
START = -1  # ends `Literal.at` if the number counts the positions before a slice
Rule = Callable[["Scope", Node], Result]
AnyRule = TypeVar("AnyRule")
ThisRule = TypeVar("ThisRule", bound=Rule)  # keeps what one rule returns
RULES: dict[str, Rule] = {}
# PyTorch modules whose forward reads sizes from attributes that may be set.
Convolution = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
FOLLOWING = Convolution | nn.GroupNorm | nn.RNNBase | nn.RNNCellBase


@dataclass(frozen=True)
class Literal:
    """A size that an operator receives as a number, so that the code may not follow the size.

    Attributes:
        node: the operator.
        axis: the tree to lock if the code does not follow the size.
        part: the tree whose size is the number.
        at: the place of the part in the result: (dimension,), or (index of the result, dimension)
            for several results; (dimension, `START`) for the positions before a slice.
    """

    node: Node
    axis: Tree
    part: Tree
    at: tuple[int, ...]


class LockError(Exception):
    """Raised by a rule that cannot describe how axes flow; all axes of the operands are locked."""


def register(*operators: str) -> Callable[[ThisRule], ThisRule]:
    """Register a rule for one or more ATen operators."""
    enter = entering(RULES, operators, "rule")

    def add(rule: ThisRule) -> ThisRule:
        enter(rule)
        return rule

    return add


def entering(
    rules: dict[str, AnyRule], operators: Sequence[str], kind: str
) -> Callable[[AnyRule], AnyRule]:
    """Make a decorator that enters a rule for operators; each operator has at most one rule."""

    def add(rule: AnyRule) -> AnyRule:
        for name in operators:
            if name in rules:
                raise ValueError(f"operator {name} already has a {kind}")
            rules[name] = rule
        return rule

    return add


def operator_name(node: Node) -> str:
    """Return the name of a node's operator without namespace, overload and in-place underscore.

    Operators outside ATen keep their namespace, so that no ATen rule applies to them by accident.
    """
    target = node.target
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    name = schema.name.removeprefix("aten::")
    return name if name.startswith("_") or not name.endswith("_") else name[:-1]


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a node by name, with the operator's defaults."""
    schema = _schema_of(node.target)
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update(zip((a.name for a in schema), node.args, strict=False))
    return {**named, **node.kwargs}


def _schema_of(operator: Any) -> Sequence[Any]:
    """List the declared arguments of an operator."""
    return operator._schema.arguments


def compute(node: Node, first: Tensor) -> Any:
    """Run a node's operator on another first tensor, with the node's other arguments."""
    assert callable(node.target)
    return node.target(first, *node.args[1:], **node.kwargs)


def modules_of(node: Node) -> list[str]:
    """List the modules whose forward recorded an operator, innermost first."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in reversed([*stack.values()])]
    # the path of a second call ends in @1
    return [re.sub(r"@\d+", "", path) if "@" in path else path for path in paths]


def location(node: Node) -> str:
    """Return "FILE:LINE" of the model's code that recorded a node; empty if unknown."""
    file, line = line_of(node) or ("", "")
    return f"{file.rpartition('/')[2]}:{line}" if file else ""


def line_of(node: Node) -> tuple[str, str] | None:
    """Return the full path of that file, and the line; None if unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return found[-1] if found else None


class Scope:
    """The state of one trace: rules read it and record their results in it."""

    def __init__(self, model: nn.Module, batch: int, aliases: Mapping[str, str]) -> None:
        self.table = AxisTable()
        self.model = model
        self.batch = batch
        self.trained = {name for name, _ in model.named_parameters()}
        self.aliases = aliases  # other name of a shared parameter -> the name used here
        self.values: dict[Node, Any] = {}  # node -> axes of its tensor, or a list of these
        self.parameters: dict[Node, str] = {}  # placeholder -> name in the state dict
        self.parameter_axes: dict[str, Axes] = {}  # also for biases that a layer could take
        self.origins: dict[Node, str] = {}  # reshaped parameter -> name in the state dict
        self.roles: dict[tuple[str, int], tuple[Role, Kind]] = {}
        self.layers: dict[str, Layer] = {}
        self.norms: list[Norm] = []
        self.attributes: list[Attribute] = []
        self.hints: list[Hint] = []
        self.costs: list[Cost] = []
        self.literals: list[Literal] = []  # sizes that the code may hold as numbers
        self.contracted: dict[Node, Tree] = {}  # product of activations -> summed axis
        self.heads: list[tuple[Node, str, Tree]] = []  # attention, role of the axis, the axis
        self.rescales: list[Rescale] = []
        self.tied: set[tuple[str, int]] = set()  # parameter axes that write here and read elsewhere
        self.normed: Counter[str] = Counter()  # weight of a norm over channels -> number of calls
        self.scales: dict[Node, tuple[Tree, float]] = {}  # number = constant * size ** exponent
        self.starts: dict[Node, Tree] = {}  # slice -> the positions before it

    def arguments(self, node: Node) -> dict[str, Any]:
        """Return the arguments of a node by name, with the operator's defaults."""
        return arguments(node)

    def axes(self, node: Node) -> Axes:
        """Return the resolved axes of a tensor."""
        return [self.table.resolve(tree) for tree in self.values[node]]

    def trees(self, node: Node) -> Iterator[Tree]:
        """List the axes of a result, or of all its tensors; none if no rule saw the node."""
        result: Result = self.values.get(node, ())
        for item in result:
            yield from item if isinstance(item, list) else [item]

    def resolved(self) -> dict[Node, Result]:
        """Resolve the axes of every result."""
        return {node: self._resolve(result) for node, result in self.values.items()}

    def _resolve(self, result: Result) -> Result:
        resolve = self.table.resolve
        return [[*map(resolve, x)] if isinstance(x, list) else resolve(x) for x in result]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the traced shape of a tensor."""
        return tuple(int(n) for n in node.meta["val"].shape)

    def fixed(self, size: int, reason: str) -> Tree:
        """Make a new axis that must keep its size."""
        return self.table.atom(size, reason)

    def is_fixed(self, tree: Tree) -> bool:
        """Tell whether all atoms of an axis are locked."""
        return not self.free_atoms(tree)

    def free_atoms(self, tree: Tree) -> list[int]:
        return [a for a in leaves(self.table.resolve(tree)) if not self.table.reasons(a)]

    def unify(self, xs: Sequence[Tree], ys: Sequence[Tree]) -> None:
        """State that two tensors have the same axes, dimension by dimension."""
        for x, y in zip(xs, ys, strict=True):
            self.table.unify(x, y)

    def begin(self, node: Node, axis: Tree, before: Tree, dim: int) -> None:
        """Record the part of an axis before a slice; the slice must begin after it at any size."""
        if not self.is_fixed(before):
            self.starts[node] = before
            self.literal(axis, node, dim, START, part=before)

    def literal(self, tree: Tree, node: Node, *at: int, part: Tree | None = None) -> None:
        """Record an axis if the operator receives its size, or the size of a part, as a number.

        Trials at other sizes (`intrafuse.graph.sizes.literals`) find out whether the code computes
        the number from shapes and attributes. If not, the axis is locked.
        """
        if not self.is_fixed(tree):
            self.literals.append(Literal(node, tree, tree if part is None else part, at))

    def follow(self, node: Node, what: str, tree: Tree) -> None:
        """Record the role of an axis in attention, for attributes that hold its size."""
        self.heads.append((node, what, tree))

    def where(self, node: Node) -> str:
        """Return " at FILE:LINE" of the code that recorded a node, for use in a sentence."""
        place = location(node)
        return f" at {place}" if place else ""

    def parameter(self, node: Node, what: str) -> str:
        """Return the name of the parameter behind an argument; `what` names it in errors."""
        if node not in self.parameters:
            raise LockError(f"its {what} is computed, not a parameter")
        return self.parameters[node]

    def uses(self, node: Node) -> int:
        """Count the operators that use the parameter behind a node, under any of its names."""
        name = self.parameters.get(node)
        same = [n for n, known in self.parameters.items() if known == name] if name else [node]
        return sum(len(n.users) for n in same)

    def optional_parameter(self, node: Node | None, what: str) -> str | None:
        """Return the name of the parameter behind an argument; None if the argument is absent."""
        return None if node is None else self.parameter(node, what)

    def use(self, parameter: str | None, axis: int, role: Role, kind: Kind) -> None:
        """Record the role and kind of a parameter axis for the channels on it."""
        if parameter is None:
            return
        known = self.roles.setdefault((parameter, axis), (role, kind))
        if known == ("writer", "weight") and (role, kind) == ("reader", "weight"):
            self.tied.add((parameter, axis))
        elif known != (role, kind):
            for tree in self.parameter_axes[parameter]:
                self.table.lock(tree, f"{parameter} is used as {known[0]} and as {role}")

    def carry(self, node: Node, kind: Kind) -> None:
        """Record a parameter, or a view of one, as carrier of channels that other layers write."""
        parameter = self.parameters.get(node) or self.origins.get(node)
        for axis in range(len(self.parameter_axes[parameter])) if parameter else ():
            self.use(parameter, axis, "carrier", kind)

    def attribute(self, parameter: str, name: str, tree: Tree, *, needed: bool = False) -> None:
        """Let an attribute of a parameter's module follow the size of an axis.

        If the attribute is needed but absent or different, lock the axis.
        """
        names = [parameter, *(alias for alias, to in self.aliases.items() if to == parameter)]
        for module in (alias.rpartition(".")[0] for alias in names):
            owner = self.model.get_submodule(module)
            known = isinstance(owner, FOLLOWING)
            value = held_size(owner, name) if known or not needed else None
            if value == self.table.measure(tree):
                self.attributes.append(Attribute(module, name, tree))
            elif needed:
                self.table.lock(tree, f"{module} has no attribute {name} to follow it")

    def owner(self, parameter: str) -> nn.Module:
        """Return the module that holds a parameter."""
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def cost(self, node: Node, layer: str, positions: float, *trees: Tree) -> None:
        """Add multiply-accumulates per sample: positions times the product of the axis sizes."""
        self.costs.append(Cost(layer, positions / self.batch, trees))

    def positions(self, node: Node, channels: int) -> float:
        """Count the elements of a tensor per channel, over the whole batch."""
        return prod(self.shape(node)) / max(channels, 1)
