"""Rules for operators that turn positions into channels: pixel shuffle, patches, sampling."""

from __future__ import annotations

from math import prod

from torch.fx import Node

from intrafuse.graph.axes import Product, Tree
from intrafuse.graph.rules.registry import Axes, LockError, Scope, register
from intrafuse.graph.rules.shape import reshape

PATCH = "positions of a patch"


def _factor(scope: Scope, tree: Tree, sizes: tuple[int, ...]) -> list[Tree]:
    factors = scope.table.factor(tree, sizes)
    if factors is None:
        raise LockError("its channels cannot be divided into equal parts")
    return factors


def _lock_positions(scope: Scope, trees: Axes) -> None:
    for tree in trees:
        scope.table.lock(tree, "spatial")


def _spatial(scope: Scope, node: Node, back: int) -> Axes:
    """Make new locked axes for the last `back` dimensions of a result."""
    shape = scope.shape(node)
    return [scope.fixed(n, "spatial") for n in shape[len(shape) - back :]]


@register("pixel_shuffle")
def pixel_shuffle(scope: Scope, node: Node) -> Axes:
    """Turn blocks of r x r channels into positions: (C r r, H, W) -> (C, H r, W r)."""
    args = scope.arguments(node)
    *batch, channels, height, width = scope.axes(args["self"])
    r = args["upscale_factor"]
    outer, *inner = _factor(scope, channels, (scope.table.measure(channels) // r**2, r, r))
    for tree in inner:
        scope.table.lock(tree, PATCH)
    _lock_positions(scope, [height, width])
    return [*batch, scope.table.resolve(outer), *_spatial(scope, node, 2)]


@register("pixel_unshuffle")
def pixel_unshuffle(scope: Scope, node: Node) -> Axes:
    """Turn r x r positions into channels: (C, H r, W r) -> (C r r, H, W)."""
    args = scope.arguments(node)
    *batch, channels, height, width = scope.axes(args["self"])
    _lock_positions(scope, [height, width])
    inner = scope.fixed(args["downscale_factor"] ** 2, PATCH)
    joined = scope.table.resolve(Product((channels, inner)))
    return [*batch, joined, *_spatial(scope, node, 2)]


@register("channel_shuffle")
def channel_shuffle(scope: Scope, node: Node) -> Axes:
    """Interleave g groups of channels; g is locked."""
    args = scope.arguments(node)
    batch, channels, *rest = scope.axes(args["self"])
    g = args["groups"]
    groups, inside = _factor(scope, channels, (g, scope.table.measure(channels) // g))
    scope.table.lock(groups, "groups of channels that are interleaved")
    return [batch, scope.table.resolve(Product((inside, groups))), *rest]


@register("im2col")
def im2col(scope: Scope, node: Node) -> Axes:
    """Turn the positions of each window into channels: (C, H, W) -> (C k, L)."""
    args = scope.arguments(node)
    *batch, channels, height, width = scope.axes(args["self"])
    _lock_positions(scope, [height, width])
    window = scope.fixed(prod(args["kernel_size"]), PATCH)
    joined = scope.table.resolve(Product((channels, window)))
    return [*batch, joined, *_spatial(scope, node, 1)]


@register("col2im")
def col2im(scope: Scope, node: Node) -> Axes:
    """Sum windows into an image: (C k, L) -> (C, H, W)."""
    args = scope.arguments(node)
    *batch, columns, windows = scope.axes(args["self"])
    k = prod(args["kernel_size"])
    channels, window = _factor(scope, columns, (scope.table.measure(columns) // k, k))
    scope.table.lock(window, PATCH)
    _lock_positions(scope, [windows])
    return [*batch, scope.table.resolve(channels), *_spatial(scope, node, 2)]


@register("unfold")
def unfold(scope: Scope, node: Node) -> Axes:
    """Slide a window along one dimension; its positions become the last dimension."""
    args = scope.arguments(node)
    x = scope.axes(args["self"])
    dim: int = args["dimension"] % len(x)
    scope.table.lock(x[dim], "a window slides along it")
    shape = scope.shape(node)
    return [*x[:dim], scope.fixed(shape[dim], PATCH), *x[dim + 1 :], scope.fixed(shape[-1], PATCH)]


@register("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(scope: Scope, node: Node) -> Axes:
    """Sample all channels at the positions of a grid."""
    args = scope.arguments(node)
    batch, channels, *positions = scope.axes(args["input"])
    samples, *grid = scope.axes(args["grid"])
    _lock_positions(scope, [*positions, *grid])
    scope.table.unify(batch, samples)
    return [batch, channels, *_spatial(scope, node, len(positions))]


@register("reshape_as", "view_as")
def reshape_as(scope: Scope, node: Node) -> Axes:
    """Reshape to the shape of another tensor."""
    args = scope.arguments(node)
    axes = reshape(scope, scope.axes(args["self"]), scope.shape(node))
    scope.unify(axes, scope.axes(args["other"]))
    return [scope.table.resolve(tree) for tree in axes]
