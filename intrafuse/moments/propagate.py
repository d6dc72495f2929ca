"""Moments of activations from the weights alone: one rule for each operator.

A rule maps the moments of an operator's inputs to those of its result. Moments describe only the
channel dimension; all positions of a channel are treated alike. A result without a rule has no
moments (None), and its readers keep the weights of conventional pruning. Model inputs are assumed
to be independent channels of mean 0 and variance 1; so are layer inputs without moments. The rules
are in the package `rules` beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import UNIT, Tree, tree_size
from intrafuse.graph.export import CONSTANT
from intrafuse.graph.rules import entering, operator_name
from intrafuse.moments.gaussian import correlation, spread
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.following import Following, is_held, warn_unknown

__all__ = ["Moments", "Origin", "Propagation", "register"]

CHANNELS_LAST = ("linear", "layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class Origin:
    """The Gaussian variables that an activation is a function of, channel by channel.

    Attributes:
        node: its result is assumed to be a Gaussian vector.
        rows: entry of that vector for each channel, (channels,); None for all in order.
        values: value of each channel at the quadrature nodes of its variable, (channels, nodes);
            None if the activation is the variable itself.
        base: the moments of that vector; None if the activation is the vector itself.
        lines: compute its entries as unit vectors whose products are their correlations, and those
            with other layers of the same input. None if no dense layer wrote it.
    """

    node: Node
    rows: Tensor | None = None
    values: Tensor | None = None
    base: Moments | None = None
    lines: Callable[[], Tensor] | None = None


Spread = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the channels of an activation.

    Attributes:
        tree: the symbolic channel axis.
        mean: (channels,), float64.
        known: the covariance, or correlation (channels, channels) and standard deviation
            (channels,), or a function that computes either when it is read for the first time:
            many activations are only factors of a product.
        origin: the Gaussian variables that it is a function of. If a rule leaves it out, the result
            is assumed to be a new Gaussian vector.
    """

    tree: Tree
    mean: Tensor
    known: Spread | Callable[[], Spread]
    origin: Origin | None = None

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance (channels, channels), float64."""
        found = self._found()
        return found if isinstance(found, Tensor) else spread(*found)

    @cached_property
    def correlated(self) -> tuple[Tensor, Tensor]:
        """The correlations (channels, channels) and standard deviations (channels,)."""
        found = self._found()
        return correlation(found) if isinstance(found, Tensor) else found

    @property
    def std(self) -> Tensor:
        """The standard deviations (channels,), float64."""
        found = self._found()
        return found.diagonal().clamp_min(0).sqrt() if isinstance(found, Tensor) else found[1]

    def part(self, rows: Tensor) -> Tensor:
        """Return the covariance of some of the channels, float64."""
        found = self._found()
        if isinstance(found, Tensor):
            return found[rows][:, rows]
        return spread(found[0][rows][:, rows], found[1][rows])

    def _found(self) -> Spread:
        if callable(self.known):  # replaced, which frees what the function holds
            object.__setattr__(self, "known", self.known())
        assert not callable(self.known)
        return self.known

    def derived(self) -> Origin | None:
        """Return the origin of another function of the same variables."""
        if self.origin is None or self.origin.base is not None:
            return self.origin
        return replace(self.origin, base=self)


CORRELATED = 0.3  # keeps most accuracy (docs/research.md)
Rule = Callable[["Propagation", Node], Moments | None]
RULES: dict[str, Rule] = {}


def register(*operators: str) -> Callable[[Rule], Rule]:
    """Register the moment rule of one or more ATen operators."""
    return entering(RULES, operators, "moment rule")


class Propagation(Following[Moments | None]):
    """The moments of every activation of a network; None where no rule describes it.

    Args:
        weights: the tensors. Where `weights.statistics` tells mean and standard deviation of a
            layer's output (a batch norm was folded into it), only its correlations are inferred.
        pending: see `Following`.
        length: correlation length between neighboring positions, in positions.
        correlated: factor, 0 to 1, on inferred correlations between the inputs of a dense layer.
    """

    def __init__(
        self,
        weights: Weights,
        pending: frozenset[str] = frozenset(),
        *,
        length: float = 1.0,
        correlated: float = CORRELATED,
    ) -> None:
        super().__init__(weights.on_cpu(), pending)
        self.length = length
        self.correlated = correlated

    def renewed(self, weights: Weights) -> Propagation:
        """Return the moments for other tensors, with nothing known."""
        return Propagation(weights, self.pending, length=self.length, correlated=self.correlated)

    def compute(self, node: Node) -> Moments | None:
        """Compute the moments of an operator's result, given those of its sources."""
        if node.op == "placeholder":
            found = _input(self, node)
        else:
            found = self._apply_rule(node) if node.op == "call_function" else None
        if found is not None and found.origin is None:
            found = replace(found, origin=Origin(node))
        return found

    def computed(self, node: Node) -> None:
        """Free what the operator was the last to need, if tensors are only tried."""
        if self._tried_from is not None:
            self.free(self.sources(node))

    def _apply_rule(self, node: Node) -> Moments | None:
        """Apply an operator's rule; if the rule fails, warn and return None.

        So a failing rule does not stop pruning, like a failing rule of the channel graph. The
        warning names the rule; the tests turn the warning into an error.
        """
        rule = RULES.get(operator_name(node))
        several = any(isinstance(value, list) for value in self.program.values.get(node, ()))
        if rule is None or several:  # `getitem` describes one of several results
            return None
        try:
            found = rule(self, node)
            if found is not None:
                n = self.size(found.tree)
                if found.mean.shape != (n,):
                    raise ValueError(f"moments of {n} channels were expected")
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError,
                TypeError, ValueError) as error:  # fmt: skip
            warn_unknown(node, "moment rule of {} failed", error)
            return None
        return found

    def tensor(self, value: object) -> Tensor | None:
        """Return the current value of a parameter, buffer or constant; None for other values."""
        name = self.program.parameter(value)
        if not name:
            constant = value.meta.get(CONSTANT) if isinstance(value, Node) else None
            return constant.cpu() if isinstance(constant, Tensor) else None
        return self.weights.state.get(name)

    def number(self, node: Node, value: float) -> float:
        """Return a number argument of an operator as the code computes it at current sizes.

        Some numbers follow the size of an axis, such as the scale of attention.
        """
        tree, exponent = self.program.scales.get(node, (UNIT, 0.0))
        ratio = self.size(tree) / tree_size(tree, self.weights.graph.sizes)
        return value * ratio**exponent

    def axes(self, node: Any) -> list[Tree]:
        """Return the tree of every dimension of a tensor."""
        return self.program.values[node]

    def operand(self, value: object, tree: Tree | None = None) -> Moments | None:
        """Return the moments of an operator's argument; None if they are unknown.

        A number is a broadcast channel of zero variance. Moments of a parameter are taken over its
        positions, along the axis `tree` or along its only axis.
        """
        if isinstance(value, int | float):
            return Moments(UNIT, torch.tensor([float(value)]).double(), torch.zeros(1, 1).double())
        if not isinstance(value, Node):
            return None
        held = is_held(self.program, value)
        return _parameter(self, value, tree) if held else self.of(value)

    def size(self, tree: Tree) -> int:
        """Return the current length of an axis."""
        return tree_size(tree, self.weights.sizes)

    def is_single(self, tree: Tree) -> bool:
        """Tell whether an axis has length one in the traced code, and so broadcasts."""
        return tree_size(tree, self.weights.graph.sizes) == 1


def _input(propagation: Propagation, node: Node) -> Moments | None:
    """Assume inputs of mean 0 and variance 1, without correlation."""
    axes = propagation.program.values.get(node)
    if not axes or node in propagation.program.parameters or len(axes) < 2:
        return None
    if not node.meta["val"].is_floating_point():
        return None
    readers = [operator_name(user) for user in node.users if user.op == "call_function"]
    tree = axes[-1 if any(name in CHANNELS_LAST for name in readers) else 1]
    n = propagation.size(tree)
    return Moments(tree, torch.zeros(n).double(), torch.eye(n).double())


def _parameter(propagation: Propagation, node: Node, tree: Tree | None) -> Moments | None:
    value, axes = propagation.tensor(node), propagation.axes(node)
    if value is None or not value.is_floating_point():
        return None
    if tree is None or value.numel() == 1:
        wide = [dim for dim, t in enumerate(axes) if not propagation.is_single(t)]
    else:
        wide = [dim for dim, t in enumerate(axes) if t == tree]
    if len(wide) > 1 or (not wide and value.numel() != 1):
        return None
    if not wide:
        return Moments(UNIT, value.double().reshape(1), torch.zeros(1, 1).double())
    lines = value.double().movedim(wide[0], 0).reshape(value.shape[wide[0]], -1)
    mean = lines.mean(1)
    centered = lines - mean[:, None]
    return Moments(axes[wide[0]], mean, centered @ centered.T / lines.shape[1])
