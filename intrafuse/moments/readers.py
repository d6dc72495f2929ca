"""Readings: the moments of a group's channels as each reader sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from intrafuse.graph.axes import Product, Tree, leaves, locate, tree_size
from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.moments.propagate import Moments, Propagation
from intrafuse.moments.taps import as_taps, output_variance, tap_correlation
from intrafuse.surgery.weights import Weights

__all__ = ["Reading", "Written", "place_taps", "reader_taps", "readings", "written"]

Written = tuple[Tensor, Tensor] | None  # mean (outputs,) and covariance of a layer's outputs


@dataclass(frozen=True, eq=False)
class Reading:
    """Moments of a group's channels as one reader sees them, in float64.

    Attributes:
        layer: name of the reader.
        taps: V (outputs, n, taps), its weight.
        kernel: K (taps, taps), the correlation between taps.
        old_mean, old: mean (n,) and covariance (n, n) of the old activations.
        new_mean, new: mean (m,) and covariance (m, m) of the new activations.
        cross: covariance (n, m) of old and new.
        rest, rest_mean: variance and mean (outputs,) of the outputs from channels of other groups.
        calls: number of calls of the layer.
    """

    layer: str
    taps: Tensor
    kernel: Tensor
    old_mean: Tensor
    old: Tensor
    new_mean: Tensor
    new: Tensor
    cross: Tensor
    rest: Tensor
    rest_mean: Tensor
    calls: int = 1

    @cached_property
    def output_variance(self) -> Tensor:
        """Variance (outputs,) of the reader's old outputs, including the rest."""
        return output_variance(self.taps, self.kernel, self.old) + self.rest

    def encoded(self, encode: Tensor) -> Reading:
        """Replace the new channels by combinations of them, E (k, m)."""
        return replace(
            self,
            new_mean=encode @ self.new_mean,
            new=encode @ self.new @ encode.T,
            cross=self.cross @ encode.T,
        )

    def narrowed(self, old: slice, new: Tensor | slice) -> Reading:
        """Keep some of the old and some of the new channels."""
        return replace(
            self,
            old_mean=self.old_mean[old],
            old=self.old[old][:, old],
            new_mean=self.new_mean[new],
            new=self.new[new][:, new],
            cross=self.cross[old][:, new],
        )


def readings(
    group: ChannelGroup, propagation: Propagation, *, places: bool = False
) -> dict[str, Reading]:
    """Infer readings of a group from the weights, by the name of each reader's weight.

    Readers without moments are left out. With `places` every place of the group on the reader's
    axis is treated as a separate channel, in the order of the axis: n r places for n channels at r
    places each, such as the width of all heads. Readers with other channels there are left out.
    """
    weights = propagation.weights
    calls = propagation.calls
    found = {}
    order = {name: i for i, name in enumerate(calls)}  # what stands before a reader may be freed
    slots = sorted(weights.present(group.readers), key=lambda slot: order.get(slot.parameter, -1))
    for slot in slots:
        nodes = calls.get(slot.parameter, [])
        moments = [propagation.operand(node.args[0]) for node in nodes]
        if slot.parameter in weights.graph.layers and moments and None not in moments:
            known = [m for m in moments if m]
            if places:
                reading = _placed(group, slot, weights, known)
            else:
                reading = _reading(group, slot, weights, known, propagation.length)
            if reading is not None:
                found[slot.parameter] = reading
    return found


def written(names: Sequence[str], propagation: Propagation) -> list[Written]:
    """Infer mean and covariance of the outputs of linear maps, given the names of their weights.

    None for a map without moments, or one that is called more than once.
    """
    graph = propagation.weights.graph
    found: list[Written] = []
    for name in names:
        nodes = propagation.calls.get(name, [])
        moments = propagation.of(nodes[0]) if len(nodes) == 1 else None
        layer = graph.layers.get(name)
        if moments is None or layer is None:
            found.append(None)
        else:
            own = moments.tree == graph.axes[name][layer.output_axis]
            found.append((moments.mean, moments.covariance) if own else None)
    return found


def _reading(
    group: ChannelGroup, slot: Slot, weights: Weights, moments: list[Moments], length: float
) -> Reading | None:
    layer = weights.graph.layers[slot.parameter]
    weight = weights.state[slot.parameter]
    n = weights.sizes[group.id]
    covariances, means = [], []
    for moment in moments:
        blocks = locate(moment.tree, group.id, weights.sizes)
        if not blocks:  # moments along another axis
            return None
        where = positions(blocks, n)
        for column in where.T:
            own = torch.from_numpy(column.copy())
            every = len(moment.mean) == n and own.equal(torch.arange(n))
            means.append(moment.mean if every else moment.mean[own])
            covariances.append(moment.covariance if every else moment.part(own))
    mean, covariance = _average(means), _average(covariances)
    taps, kernel, rows = reader_taps(group, slot, weights, length)
    rest, rest_mean = torch.zeros(len(taps)).double(), torch.zeros(len(taps)).double()
    if len(moments) == 1 and rows.numel() < weight.shape[slot.axis] == len(moments[0].mean):
        others = torch.ones(weight.shape[slot.axis], dtype=torch.bool)
        others[rows.flatten()] = False
        part = as_taps(weight, layer.output_axis, layer.input_axis)[:, others].double()
        grid = kernel if len(kernel) == part.shape[2] else torch.eye(part.shape[2]).double()
        rest = output_variance(part, grid, moments[0].part(others))
        rest_mean = part.sum(2) @ moments[0].mean[others]
    return Reading(
        layer.name,
        taps,
        kernel,
        mean,
        covariance,
        mean,
        covariance,
        covariance,
        rest,
        rest_mean,
        len(moments),
    )


def _average(parts: list[Tensor]) -> Tensor:
    """Return the mean over calls and places; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def _placed(
    group: ChannelGroup, slot: Slot, weights: Weights, moments: list[Moments]
) -> Reading | None:
    taps = place_taps(group, slot, weights)
    tree = weights.graph.axes[slot.parameter][slot.axis]
    if taps is None or any(moment.tree != tree for moment in moments):
        return None
    mean = _average([m.mean for m in moments])
    covariance = _average([m.covariance for m in moments])
    zero = torch.zeros(len(taps)).double()
    layer = weights.graph.layers[slot.parameter].name
    return Reading(
        layer, taps, torch.ones(1, 1).double(), mean, covariance, mean, covariance, covariance,
        zero, zero, len(moments),
    )  # fmt: skip


def place_taps(group: ChannelGroup, slot: Slot, weights: Weights) -> Tensor | None:
    """Return V (outputs, places, 1) of a linear map that reads a group and nothing else."""
    layer = weights.graph.layers[slot.parameter]
    weight = weights.state[slot.parameter].cpu()
    blocks = weights.graph.blocks(slot, group.id, weights.sizes)
    count = positions(blocks, weights.sizes[group.id]).size
    if weight.dim() != 2 or count != weight.shape[slot.axis]:
        return None
    return weight.movedim(layer.output_axis, 0).double()[:, :, None]


def reader_taps(
    group: ChannelGroup, slot: Slot, weights: Weights, length: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the part of a reader's weight that reads a group.

    Returns:
        V (outputs, n, taps), K (taps, taps), and the positions (n, repeats) on its input axis.
    """
    layer = weights.graph.layers[slot.parameter]
    blocks = weights.graph.blocks(slot, group.id, weights.sizes)
    rows = torch.from_numpy(positions(blocks, weights.sizes[group.id]))
    weight = weights.state[slot.parameter].cpu()
    front = weight.movedim((layer.output_axis, layer.input_axis), (0, 1))
    if not rows.equal(torch.arange(front.shape[1])[:, None]):  # else a view is enough
        front = front[:, rows]
    taps = front.reshape(*front.shape[:2], -1).double()
    kernel = _kernel(weights, slot, group, tuple(front.shape[2:]), taps.shape[2], length)
    return taps, kernel, rows


def _kernel(
    weights: Weights, slot: Slot, group: ChannelGroup, kernel: tuple[int, ...], taps: int,
    length: float,
) -> Tensor:  # fmt: skip
    """Correlate the taps of a kernel, or the positions of a channel in a flattened map."""
    found = tap_correlation(kernel, length)
    if len(found) == taps:
        return found
    tree = weights.graph.axes[slot.parameter][slot.axis]
    grid = _positions_behind(tree, group.id, weights)
    if tap_correlation(grid, length).shape[0] == taps:
        return tap_correlation(grid, length)
    return torch.eye(taps, dtype=torch.double)


def _positions_behind(tree: Tree, atom: int, weights: Weights) -> tuple[int, ...]:
    if isinstance(tree, Product) and tree.factors[0] == atom:
        return tuple(tree_size(factor, weights.sizes) for factor in tree.factors[1:])
    if isinstance(tree, int) or atom not in leaves(tree):
        return ()
    children = tree.factors if isinstance(tree, Product) else tree.parts
    return next((_positions_behind(c, atom, weights) for c in children if atom in leaves(c)), ())
