"""Moment rules for operators that move, copy, pool, cut or pad channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import Product, Sum, Tree, leaves, tree_size
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.registry import (
    CASTS,
    DROPOUTS,
    LIFTS,
    PERMUTATIONS,
    RESHAPES,
    SPLITS,
)
from intrafuse.moments.propagate import Moments, Propagation, register

__all__ = ["elsewhere", "kept", "part"]

# Operators that give values, and then numbers of the positions that hold them.
POOLS = ("adaptive_max_pool{}d", "fractional_max_pool{}d", "max_pool{}d_with_indices")
EXTREMES = frozenset(("max", "min", *(pool.format(n) for pool in POOLS for n in (1, 2, 3))))


@register(*sorted(PERMUTATIONS | CASTS | LIFTS | RESHAPES | DROPOUTS - {"native_dropout"}))
@register("pixel_unshuffle", "channel_shuffle")
def moved(propagation: Propagation, node: Node) -> Moments | None:
    """Keep the moments of moved or copied channels, on whichever axis they are now."""
    before = propagation.operand(node.args[0])
    return None if before is None else kept(propagation, before, propagation.axes(node))


@register("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
          "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "amax",
          "amin", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
          "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
          "upsample_trilinear3d")  # fmt: skip
def resampled(propagation: Propagation, node: Node) -> Moments | None:
    """Keep the moments: a change common to all channels cancels in every readout."""
    before = propagation.operand(node.args[0])
    return None if before is None else elsewhere(propagation, before, node)


@register("pixel_shuffle")
def pixel_shuffle(propagation: Propagation, node: Node) -> Moments | None:
    """Keep the moments of the places of each channel, which become positions."""
    before = propagation.operand(node.args[0])
    return (
        before if before is not None and before.tree == propagation.axes(node.args[0])[-3] else None
    )


def kept(propagation: Propagation, before: Moments, axes: Sequence[Tree]) -> Moments | None:
    """Follow channels into a tensor with other axes; None if it lacks some of them."""
    if before.tree in axes:
        return before
    atoms = Counter(leaves(before.tree))
    for tree in axes:
        if Counter(leaves(tree)) == atoms:
            return _reordered(propagation, before, tree)
    return before if atoms <= Counter(atom for tree in axes for atom in leaves(tree)) else None


def elsewhere(propagation: Propagation, before: Moments, node: Node) -> Moments | None:
    """Keep moments at other positions, where the same variables have other values."""
    found = kept(propagation, before, propagation.axes(node))
    return None if found is None else replace(found, origin=None)


def _reordered(propagation: Propagation, before: Moments, tree: Tree) -> Moments | None:
    """Follow a channel shuffle: the same factors in another order."""
    if not (isinstance(tree, Product) and isinstance(before.tree, Product)):
        return None
    old = before.tree.factors
    if sorted(map(repr, old)) != sorted(map(repr, tree.factors)):
        return None
    order = [old.index(factor) for factor in tree.factors]
    places = torch.arange(len(before.mean)).reshape([propagation.size(f) for f in old])
    return _taken(before, places.permute(order).flatten(), tree)


def _taken(before: Moments, rows: Tensor, tree: Tree) -> Moments:
    origin = before.derived()
    if origin is not None:
        own = rows if origin.rows is None else origin.rows[rows]
        values = None if origin.values is None else origin.values[rows]
        origin = replace(origin, rows=own, values=values)
    return Moments(tree, before.mean[rows], before.covariance[rows][:, rows], origin)


def part(
    propagation: Propagation, before: Moments, whole: Tree, start: int, piece: Tree | None
) -> Moments | None:
    """Take a range of the channel axis, or of one of its factors.

    Args:
        whole: the axis to cut: the channel axis, or a factor of it.
        start: the first position.
        piece: the tree of the range; None takes the single position `start` and drops the factor.
    """
    if before.tree == whole:
        factors: tuple[Tree, ...] = (whole,)
    else:
        factors = before.tree.factors if isinstance(before.tree, Product) else ()
    if factors.count(whole) != 1:
        return None
    at = factors.index(whole)
    places = torch.arange(len(before.mean)).reshape([propagation.size(f) for f in factors])
    rows = places.narrow(at, start, 1 if piece is None else propagation.size(piece)).flatten()
    left = (*factors[:at], *(() if piece is None else (piece,)), *factors[at + 1 :])
    if not left:
        return None  # no channel axis is left
    return _taken(before, rows, left[0] if len(left) == 1 else Product(left))


@register("slice", "narrow")
def slice_(propagation: Propagation, node: Node) -> Moments | None:
    """Take a range of channels; a range of another axis does not change the moments."""
    args = arguments(node)
    before, axes = propagation.operand(node.args[0]), propagation.axes(node.args[0])
    if before is None:
        return None
    whole, piece = axes[args["dim"]], propagation.axes(node)[args["dim"]]
    if whole == piece:
        return before
    if not _shares(whole, before.tree):
        return elsewhere(propagation, before, node)
    if args.get("step", 1) != 1:
        return None
    old = propagation.weights.graph.sizes
    start, _, _ = slice(args["start"], None).indices(tree_size(whole, old))
    border = _border(whole, start, old, propagation.weights.sizes)
    return None if border is None else part(propagation, before, whole, border, piece)


def _border(tree: Tree, at: int, old: Mapping[int, int], new: Mapping[int, int]) -> int | None:
    """Map a boundary between positions of an axis to its place at the current sizes of atoms.

    None for a boundary inside an atom or block whose size has changed: its place is unknown.
    """
    if isinstance(tree, Sum):
        passed = 0
        for piece in tree.parts:
            n = tree_size(piece, old)
            if at < n:
                inside = _border(piece, at, old, new)
                return None if inside is None else passed + inside
            at, passed = at - n, passed + tree_size(piece, new)
        return passed
    if at in (0, tree_size(tree, old)):
        return tree_size(tree, new) if at else 0
    if isinstance(tree, Product):
        rest = Product(tree.factors[1:])
        front, inside = divmod(at, tree_size(rest, old))
        found = None if inside else _border(tree.factors[0], front, old, new)
        if found is not None:
            return found * tree_size(rest, new)
    return at if all(old[atom] == new[atom] for atom in leaves(tree)) else None


@register("select")
def select(propagation: Propagation, node: Node) -> Moments | None:
    """Take one position of a factor of the channel axis, or of another axis."""
    args = arguments(node)
    return _selected(propagation, node.args[0], node, args["dim"], args["index"])


@register("getitem")
def getitem(propagation: Propagation, node: Node) -> Moments | None:
    """Take one result of chunk, split or unbind, or the values of a maximum."""
    source, index = node.args
    if not isinstance(source, Node) or not isinstance(index, int):
        return None
    name = operator_name(source)
    if name in EXTREMES:
        before = propagation.operand(source.args[0]) if index == 0 else None
        return None if before is None else elsewhere(propagation, before, node)
    if name == "unbind":
        return _selected(propagation, source.args[0], node, arguments(source)["dim"], index)
    if name not in SPLITS:
        return None
    dim = arguments(source)["dim"]
    before, axes = propagation.operand(source.args[0]), propagation.axes(source.args[0])
    if before is None:
        return None
    if not _shares(axes[dim], before.tree):
        return elsewhere(propagation, before, node)
    pieces = [result[dim] for result in propagation.program.values[source]]
    start = sum(map(propagation.size, pieces[:index]))
    return part(propagation, before, axes[dim], start, pieces[index])


def _selected(
    propagation: Propagation, source: object, node: Node, dim: int, index: int
) -> Moments | None:
    before = propagation.operand(source)
    if before is None or not isinstance(source, Node):
        return None
    whole = propagation.axes(source)[dim]
    if not _shares(whole, before.tree):
        return elsewhere(propagation, before, node)
    return part(propagation, before, whole, index % propagation.size(whole), None)


def _shares(tree: Tree, channels: Tree) -> bool:
    """Tell whether an axis holds any of the channels."""
    return not set(leaves(tree)).isdisjoint(leaves(channels))


@register("pad", "constant_pad_nd")
def pad(propagation: Propagation, node: Node) -> Moments | None:
    """Put channels of one value around the channels; padded positions are ignored."""
    args = arguments(node)
    before, axes = propagation.operand(node.args[0]), propagation.axes(node.args[0])
    if before is None:
        return None
    for back in range(1, len(args["pad"]) // 2 + 1):
        sides = tuple(args["pad"][2 * back - 2 : 2 * back])
        if not any(sides) or not _shares(axes[-back], before.tree):
            continue
        if axes[-back] != before.tree or args.get("mode", "constant") != "constant":
            return None
        mean = torch.nn.functional.pad(before.mean, sides, value=float(args["value"] or 0))
        covariance = torch.nn.functional.pad(before.covariance, (*sides, *sides))
        return Moments(propagation.axes(node)[-back], mean, covariance)
    return elsewhere(propagation, before, node)
