"""The channel graph as frozen data: groups, slots, layers, norms, costs, module attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from intrafuse.graph.axes import Block, Tree, locate, tree_size
from intrafuse.graph.program import Program
from intrafuse.support.errors import IntrafuseError

__all__ = [
    "HELD",
    "NORMED",
    "Attribute",
    "ChannelGraph",
    "ChannelGroup",
    "Cost",
    "Hint",
    "Layer",
    "Norm",
    "Rescale",
    "Role",
    "Slot",
]

Role = Literal["writer", "carrier", "reader"]
Kind = Literal["weight", "bias", "scale", "shift", "mean", "variance", "function"]
# Reason why channels of a norm may be removed but not combined.
NORMED = "a norm takes its statistics over it"
# Continues the reason of a group that is locked until `include` names it.
HELD = ": it is locked unless `include` names it, as in "


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter axis on which a channel group lies.

    Attributes:
        parameter: name in the state dict.
        axis: the dimension of the parameter.
        role: writer, carrier or reader of the channels.
        kind: `weight` or `bias` of a writer or reader; for a carrier, `scale` (multiplies the
            channel), `shift` (is added to the channel), `mean` or `variance` (running statistics),
            or `function` (acts on the channel through another function).
        blocks: the places of the channels along the axis at the traced sizes.
    """

    parameter: str
    axis: int
    role: Role
    kind: Kind
    blocks: tuple[Block, ...]

    @property
    def layer(self) -> str:
        """The module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """All parameter axes that must shrink together.

    Attributes:
        id: the atom that stands for the channels in the trees of `ChannelGraph.axes`.
        name: the first layer that writes the channels (with `#k` if it writes several groups).
        index: position in the paper's order; 0 is nearest to the output.
        size: number of channels.
        slots: every parameter axis of the group, in order of execution.
        locked: the reasons why the group must keep its size; empty if it may shrink.
        chosen: the reasons why channels may be removed but not combined; empty if they may be
            combined.
    """

    id: int
    name: str
    index: int
    size: int
    slots: tuple[Slot, ...]
    locked: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    @property
    def writers(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role == "writer")

    @property
    def carriers(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role == "carrier")

    @property
    def readers(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role == "reader")

    @property
    def normed(self) -> bool:
        """Whether a layer norm or RMS norm takes its statistics over the channels."""
        return NORMED in self.chosen

    @property
    def held(self) -> bool:
        """Whether the group is locked only until `include` names it."""
        return bool(self.locked) and all(HELD in reason for reason in self.locked)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that write the channels, without repetition."""
        return tuple(dict.fromkeys(slot.layer for slot in self.writers))


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear map of the graph.

    Attributes:
        name: the module's path.
        operator: the ATen operator, such as `conv2d`.
        weight, bias: names in the state dict; bias is None without a bias.
        output_axis, input_axis: axes of the weight that hold output and input channels.
    """

    name: str
    operator: str
    weight: str
    bias: str | None
    output_axis: int
    input_axis: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm in evaluation mode.

    Attributes:
        name: the module's path.
        weight, bias: names of the affine parameters; None if the norm has none.
        mean, variance: names of the running statistics.
        eps: added to the variance.
        layer: weight name of the layer that feeds only this norm; None without such a layer.
    """

    name: str
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float
    layer: str | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the norm's parameters and buffers."""
        names = (self.weight, self.bias, self.mean, self.variance)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A module attribute that must equal the size of an axis, such as `out_channels`.

    Names are those of `intrafuse.support.modules.held_sizes`, such as `normalized_shape.0`.
    """

    module: str
    name: str
    tree: Tree


@dataclass(frozen=True, slots=True)
class Hint:
    """A number of a module that may be a size, although no traced operator reads it.

    Attributes:
        module: the module's path.
        name: the attribute.
        trees: axes of this size on the nearest parameters. The number follows them if they agree.
    """

    module: str
    name: str
    trees: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates of one operator per sample: factor times the product of axis sizes."""

    layer: str
    factor: float
    trees: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Rescale:
    """Outputs of a layer that must be rescaled with a size, because the code divides by its root.

    Attention divides products of queries and keys by the root of their width. When the width
    shrinks from d to m, the layer that writes the queries is multiplied by (m / d) ** exponent to
    keep the products. The weight of a layer norm or RMS norm is multiplied likewise, because the
    norm divides by the root of a mean over the channels.

    Attributes:
        weight, bias: names in the state dict; bias is None without a bias.
        axis: the axis of the weight that holds the outputs.
        before, part: tree of the outputs before the rescaled ones, and tree of the rescaled ones.
        over: tree of the size.
        exponent: exponent of the ratio of sizes.
        offset: the number that the code adds to the weight before multiplying by it.
    """

    weight: str
    bias: str | None
    axis: int
    before: Tree
    part: Tree
    over: Tree
    exponent: float
    offset: float = 0.0


@dataclass(frozen=True)
class ChannelGraph:
    """The channel groups of a model, and everything else that a trace records.

    Attributes:
        groups: the prunable channel groups, from input to output.
        locked: groups that must keep their size, with the reasons.
        axes: for each parameter and buffer, the tree of every dimension.
        sizes: the traced size of every atom.
        layers: convolutions and linear maps by the name of their weight, in order of execution.
        norms: the batch norms, in order of execution.
        attributes: the module attributes that follow the sizes.
        costs: the terms whose sum is the number of multiply-accumulates.
        aliases: other names of shared (tied) parameters -> the name used here.
        rescales: the layers whose outputs are rescaled with a size.
        hints: the numbers that may be sizes although no traced operator reads them.
        traced: the operators; None in a graph that was loaded from a file. `program` refuses None.
    """

    groups: tuple[ChannelGroup, ...]
    locked: tuple[ChannelGroup, ...]
    axes: Mapping[str, tuple[Tree, ...]]
    sizes: Mapping[int, int]
    layers: Mapping[str, Layer]
    norms: tuple[Norm, ...]
    attributes: tuple[Attribute, ...]
    costs: tuple[Cost, ...]
    aliases: Mapping[str, str]
    rescales: tuple[Rescale, ...] = ()
    hints: tuple[Hint, ...] = ()
    traced: Program | None = field(default=None, repr=False, compare=False)

    @property
    def program(self) -> Program:
        """The operators of the traced model.

        Raises:
            IntrafuseError: the graph was loaded from a file, and files hold no operators.
        """
        if self.traced is None:
            raise IntrafuseError(
                "a loaded plan does not know the operators of its network",
                remedy="make the plan again by intrafuse.plan, or the graph by intrafuse.trace",
            )
        return self.traced

    @cached_property
    def by_name(self) -> Mapping[str, ChannelGroup]:
        """The prunable groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """The traced number of channels of each prunable group, by name."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def own_norms(self) -> tuple[Norm, ...]:
        """The norms that share no tensor with another norm, so that each can be set separately."""
        uses = Counter(name for norm in self.norms for name in norm.tensors)
        return tuple(n for n in self.norms if all(uses[name] == 1 for name in n.tensors))

    def blocks(self, slot: Slot, group: int, sizes: Mapping[int, int]) -> tuple[Block, ...]:
        """Find the places of a group's channels along a slot's axis at the given sizes."""
        return locate(self.axes[slot.parameter][slot.axis], group, sizes)

    def shape(self, parameter: str, sizes: Mapping[int, int]) -> tuple[int, ...]:
        """Predict the shape of a parameter at the given sizes of the atoms."""
        return tuple(tree_size(tree, sizes) for tree in self.axes[parameter])

    def resized(self, widths: Mapping[str, int]) -> dict[int, int]:
        """Return the sizes of all atoms if the named groups have the given widths."""
        changed = {self.by_name[name].id: width for name, width in widths.items()}
        return {**self.sizes, **changed}

    def attribute_values(self, sizes: Mapping[int, int]) -> dict[str, dict[str, int]]:
        """Compute the module attributes at the given sizes: {module: {attribute: value}}."""
        values: dict[str, dict[str, int]] = {}
        for item in self.attributes:
            values.setdefault(item.module, {})[item.name] = tree_size(item.tree, sizes)
        for hint in self.hints:
            now = {tree_size(tree, sizes) for tree in hint.trees}
            if len(now) == 1:
                values.setdefault(hint.module, {})[hint.name] = now.pop()
        return values

    def unclear(self, sizes: Mapping[int, int]) -> tuple[str, ...]:
        """List hints whose axes no longer have one common size, as "module.name"."""
        return tuple(
            f"{hint.module}.{hint.name}".lstrip(".")
            for hint in self.hints
            if len({tree_size(tree, sizes) for tree in hint.trees}) > 1
        )

    def macs(self, sizes: Mapping[int, int]) -> int:
        """Count the multiply-accumulates for one sample at the given sizes."""
        return round(sum(c.factor * prod(tree_size(t, sizes) for t in c.trees) for c in self.costs))
