"""Rules for operators that reduce or resample positions: pooling, mean, upsampling."""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import UNIT
from intrafuse.graph.rules.registry import Axes, Scope, operator_name, register
from intrafuse.graph.typed import is_several

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
    """Change the spatial sizes of all channels in the same way."""
    match = re.search(r"(\d)d", operator_name(node))
    assert match is not None
    spatial = int(match[1])
    x = scope.axes(node.all_input_nodes[0])
    value = node.meta["val"]
    result: Tensor = value[0] if is_several(value) else value
    sizes = [int(n) for n in result.shape[len(x) - spatial :]]
    for tree in x[len(x) - spatial :]:
        scope.table.lock(tree, "spatial")
    axes = [*x[: len(x) - spatial], *(scope.fixed(n, "spatial") for n in sizes)]
    return [axes] * len(value) if is_several(value) else axes


@register("amax", "amin", "max", "min", "var", "std", "prod", "logsumexp", "any")
def reduce(scope: Scope, node: Node) -> Axes | list[Axes]:
    """Reduce dimensions to one value and lock them, because every position contributes."""
    args = scope.arguments(node)
    x = scope.axes(node.all_input_nodes[0])
    dims = args.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else dims
    dims = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in dims:
        scope.table.lock(x[dim], f"{operator_name(node)} is taken over it")
    keep = args.get("keepdim", False)
    axes = [UNIT if dim in dims else t for dim, t in enumerate(x) if keep or dim not in dims]
    value = node.meta["val"]
    return [axes] * len(value) if is_several(value) else axes
