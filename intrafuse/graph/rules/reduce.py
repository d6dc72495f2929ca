"""Rules for operators that reduce or resample positions: pooling, mean, upsampling, attention."""

from __future__ import annotations

import re

from torch.fx import Node

from intrafuse.graph.axes import UNIT
from intrafuse.graph.rules.registry import Axes, Scope, operator_name, register

POOLS = [
    f"{kind}_pool{n}d"
    for n in (1, 2, 3)
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "fractional_max", "_adaptive_avg")
]
UPSAMPLE = [
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
]


@register(*POOLS, *UPSAMPLE, *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)))
def resample(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Change the spatial sizes of every channel alike."""
    match = re.search(r"(\d)d", operator_name(node))
    assert match is not None
    spatial = int(match[1])
    x = scope.axes(node.all_input_nodes[0])
    value = node.meta["val"]
    result = value[0] if isinstance(value, tuple | list) else value
    sizes = [int(n) for n in result.shape[len(x) - spatial :]]
    for tree in x[len(x) - spatial :]:
        scope.table.lock(tree, "spatial")
    axes = [*x[: len(x) - spatial], *(scope.fixed(n, "spatial") for n in sizes)]
    return [axes] * len(value) if isinstance(value, tuple | list) else axes


@register("mean", "sum", "amax", "amin", "max", "min", "var", "std", "prod", "logsumexp", "any")
def reduce(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Reduce dimensions to one value, to which every position contributes."""
    args = scope.arguments(node)
    x = scope.axes(node.all_input_nodes[0])
    dims = args.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else dims
    dims = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in dims:
        scope.table.lock(x[dim], f"{operator_name(node)} is taken over it")
    keep = args.get("keepdim", False)
    axes = [UNIT if dim in dims else t for dim, t in enumerate(x) if keep or dim not in dims]
    several = isinstance(node.meta["val"], tuple | list)
    return [axes] * len(node.meta["val"]) if several else axes


@register("scaled_dot_product_attention")
def attention(scope: Scope, node: Node) -> Axes:
    """softmax(q k^T / sqrt(d)) v: heads are coupled; d enters the scale and stays."""
    args = scope.arguments(node)
    q, k, v = (scope.axes(args[name]) for name in ("query", "key", "value"))
    table = scope.table
    batch = len(q) - 2
    if args["enable_gqa"]:
        table.lock(q[batch - 1], "heads that share keys and values")
        table.lock(k[batch - 1], "heads that share keys and values")
        scope.unify(k[:batch], v[:batch])
    else:
        for axes in (k, v):
            scope.unify(q[:batch], axes[:batch])
    table.unify(q[-1], k[-1])
    table.unify(k[-2], v[-2])
    table.lock(q[-1], "its size enters the scale of attention")
    if args["attn_mask"] is not None:
        mask, shape = scope.axes(args["attn_mask"]), scope.shape(args["attn_mask"])
        for back, other in enumerate(reversed((*q[:-1], k[-2])), 1):
            if back <= len(mask) and shape[-back] != 1:
                table.unify(mask[-back], other)
    for tree in (q[-2], k[-2]):
        table.lock(tree, "positions of a sequence")
    scope.cost(node, "attention", 1, *q, k[-2])
    scope.cost(node, "attention", 1, *q[:-1], *v[-2:])
    return [*(table.resolve(tree) for tree in q[:-1]), table.resolve(v[-1])]
