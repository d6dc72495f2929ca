"""Moment rule for attention.

Letters, for heads g and h with T keys: q, k, v are Gaussian vectors at a query, a key and a value,
every position has its own draw of k and v; s is the scale; l = s q k the logits; a = softmax(l).

    covariance of the logits of a query   w_gh = s^2 E[q_g' Cov(k_g, k_h) q_h]
    weight on the same positions          E[sum_i a_gi a_hi] ~ exp(w_gh) / sqrt(z_g z_h)
                                          z_h = T - 1 + exp(w_hh);  for g = h it is called p
    output                                o = sum_i a_i v_i
                                          E[o | q] ~ E[v] + (1 - p) s Cov(v, k) q

For many keys all are exact: weights exp(l) tilt a Gaussian, which moves its mean by the
covariance with l and does not change its covariance. p = 1 means that attention reads a single
position, p = 1 / T that it averages all positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.axes import leaves
from intrafuse.graph.rules import arguments
from intrafuse.moments.propagate import Moments, Propagation, register
from intrafuse.moments.rules.pointwise import cross_covariance
from intrafuse.moments.rules.shape import kept


@register("scaled_dot_product_attention")
def attention(propagation: Propagation, node: Node) -> Moments | None:
    """Average the values over an effective number of positions, set by the logits' variance.

    Exact for equal keys. Masks, and correlations between positions of one sequence, are ignored. If
    queries or keys are unknown, or several query heads share keys, attention to a single position
    is assumed, which gives an upper bound of the variance.
    """
    args = arguments(node)
    names = ("query", "key", "value")
    query, key, value = (propagation.operand(args[name]) for name in names)
    found = None if value is None else kept(propagation, value, propagation.axes(node))
    if found is None:
        return None
    heads = [
        _heads(propagation, args[name], m)
        for name, m in zip(names, (query, key, value), strict=True)
    ]
    positions = propagation.size(propagation.axes(args["key"])[-2])
    if args["is_causal"]:
        positions = (positions + 1) // 2
    if query is None or key is None or value is None or positions == 1:
        return replace(found, origin=None)
    count = heads[0]
    if count is None or heads.count(count) < 3:
        return replace(found, origin=None)
    scale = args["scale"]
    if scale is None:
        scale = (len(query.mean) // count) ** -0.5
    else:
        scale = propagation.number(node, scale)
    cross = cross_covariance(value, key)
    mean, covariance = _averaged(query, key, value, cross, count, scale, positions)
    return Moments(found.tree, mean, covariance)


def _heads(propagation: Propagation, node: Node, moments: Moments | None) -> int | None:
    """Count the heads if moments describe heads x width, else return None."""
    axes = propagation.axes(node)
    if moments is None or len(axes) < 3:
        return None
    layout = (*leaves(axes[-3]), *leaves(axes[-1]))
    return propagation.size(axes[-3]) if tuple(leaves(moments.tree)) == layout else None


def _averaged(
    query: Moments, key: Moments, value: Moments, cross: Tensor | None, heads: int, scale: float,
    positions: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return mean and covariance of the outputs of all heads; `cross` is Cov(v, k)."""
    power = query.covariance + torch.outer(query.mean, query.mean)
    width = len(query.mean) // heads
    logits = (power * key.covariance).reshape(heads, width, heads, width).sum((1, 3)) * scale**2
    others = torch.tensor(positions - 1).double().log()
    level = torch.logaddexp(others, logits.diagonal())  # log of T - 1 + exp(w)
    overlap = (logits - (level + level[:, None]) / 2).exp()
    single = overlap.diagonal()  # p
    each = len(value.mean) // heads
    overlap = overlap.repeat_interleave(each, 0).repeat_interleave(each, 1)
    covariance = overlap * value.covariance
    if cross is None:
        return value.mean, covariance
    tilt = torch.block_diag(*(scale * (1 - single))[:, None, None] * _own_blocks(cross, heads))
    return value.mean + tilt @ query.mean, covariance + tilt @ query.covariance @ tilt.T


def _own_blocks(matrix: Tensor, heads: int) -> Tensor:
    """Take the diagonal block of each head from a matrix: (heads, rows, columns)."""
    blocks = matrix.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
