"""Reduce the width inside attention heads: products of fewer channels, closest to the old ones.

Letters, for one head of width n that keeps m:

    q, k   a query and a key (n,)            A = E[q q'] = L L, B = Cov(k) = K K
    logit  q' k, except a term that all keys of a query share, which the softmax cancels
    P, R   (m, n): new queries P q, new keys R k, and (P q)' (R k) ~ q' k

With L K = U S V' the best m products are P = S^1/2 U_m' L^-1, R = S^1/2 V_m' K^-1 (Eckart and
Young). Values v with covariance C = L L are read by W. Their best m combinations come from
W L = U S V': P = V_m' L^-1. A softmax weighs positions, not channels, so it averages P v as v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.registry import CASTS, DROPOUTS, PERMUTATIONS, SHAPES
from intrafuse.moments.readers import Reading
from intrafuse.moments.sources import MomentSource
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["place_encode", "with_products"]

MOVES = PERMUTATIONS | CASTS | SHAPES | DROPOUTS


def with_products(
    merge_map: MergeMap,
    group: ChannelGroup,
    known: Mapping[str, Reading],
    source: MomentSource,
    context: Context,
) -> MergeMap:
    """Replace a selection by new queries, keys and values for each head.

    Args:
        merge_map: the selection.
        group: the width of queries and keys, and of values if it is the same.
        known: readings of the places of the values, by reader.
        source: the source of the moments.
        context: the state of planning.

    Returns:
        The map with its `writers` set. The selection itself if anything except a linear map
        writes queries, keys or values. If heads share keys, queries and keys stay selected.
    """
    weights = context.weights
    layers = _layers(group, weights)
    if layers is None:
        return merge_map
    query, key, value = layers
    found: dict[str, Tensor] = {}
    rows = [_rows(group, name, weights) for name in layers]
    if rows[0] is not None and rows[1] is not None and len(rows[0]) == len(rows[1]):
        queries, keys = source.outputs([query, key], weights, context)
        if queries is not None and keys is not None:
            power = queries[1] + torch.outer(queries[0], queries[0])
            pairs = _own(power, rows[0]), _own(keys[1], rows[1])
            found[query], found[key] = best_products(*pairs, merge_map.width, source.ridge)
    if rows[2] is not None:
        values = _read_values(group, known, len(rows[2]), merge_map.width, source.ridge, weights)
        found |= {} if values is None else {value: values}
    biases = {str(weights.graph.layers[name].bias): p for name, p in found.items()}
    found |= {name: p for name, p in biases.items() if name in weights.state}
    writers = {name: matrix.float() for name, matrix in found.items()}
    return replace(merge_map, writers=writers, keep=None if writers else merge_map.keep)


def _read_values(
    group: ChannelGroup, known: Mapping[str, Reading], heads: int, width: int, ridge: float,
    weights: Weights,
) -> Tensor | None:  # fmt: skip
    """Combine the values of each head into those read most, if all readings are known."""
    read = [slot.parameter for slot in group.readers]
    found = [_rows(group, name, weights) for name in read]
    rows = [own for own in found if own is not None]
    if not read or set(read) != set(known) or len(rows) < len(read) or len(rows[0]) != heads:
        return None
    if not all(own.equal(rows[0]) for own in rows):
        return None
    taps = torch.cat([known[name].taps[:, :, 0] for name in read])
    spread = torch.stack([known[name].new for name in read]).mean(0)
    return best_values(_own(spread, rows[0]), taps[:, rows[0]].movedim(0, 1), width, ridge)


def best_products(power: Tensor, other: Tensor, width: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Compute P and R (heads, m, n) from A and B (heads, n, n); `ridge` as for readouts.

    >>> a = torch.diag(torch.tensor([4.0, 1.0])).double()[None]
    >>> best_products(a, torch.eye(2).double()[None], 1, 0.0)[0].abs().round(decimals=3)
    tensor([[[0.7070, 0.0000]]], dtype=torch.float64)
    """
    (first, first_inverse), (second, second_inverse) = _roots(power, ridge), _roots(other, ridge)
    left, size, right = torch.linalg.svd(first @ second)
    half = size[:, :width, None].sqrt()
    queries = half * (left[:, :, :width].mT @ first_inverse)
    return queries, half * (right[:, :width] @ second_inverse)


def best_values(spread: Tensor, read: Tensor, width: int, ridge: float) -> Tensor:
    """Compute P (heads, m, n) from C (heads, n, n) and W (heads, outputs, n)."""
    root, inverse = _roots(spread, ridge)
    power = root @ read.mT @ read @ root
    right = torch.linalg.eigh(power).eigenvectors.flip(2)[:, :, :width]
    return right.mT @ inverse


def place_encode(merge_map: MergeMap, group: ChannelGroup, name: str, weights: Weights) -> Tensor:
    """Return E (m r, n r), from old to new places on a reader's axis, float64."""
    slot = next(slot for slot in group.readers if slot.parameter == name)
    old = positions(weights.graph.blocks(slot, group.id, weights.sizes), merge_map.size)
    sizes = {**weights.sizes, group.id: merge_map.width}
    new = positions(weights.graph.blocks(slot, group.id, sizes), merge_map.width)
    layers = _layers(group, weights)
    encode = merge_map.encode.expand(old.shape[1], *merge_map.encode.shape)
    if layers is not None and layers[2] in merge_map.writers:
        encode = merge_map.writers[layers[2]]
    places = torch.zeros(new.size, old.size).double()
    for place, matrix in enumerate(encode):
        places[torch.from_numpy(new[:, place])[:, None], torch.from_numpy(old[:, place])] = (
            matrix.double()
        )
    return places


def _layers(group: ChannelGroup, weights: Weights) -> tuple[str, str, str] | None:
    """Name the weights that write queries, keys and values, if no operator changes them after."""
    program = weights.graph.program
    calls = [
        node
        for node in program.nodes
        if operator_name(node) == "scaled_dot_product_attention"
        and group.id == program.values[arguments(node)["query"]][-1]
    ]
    if len(calls) != 1:
        return None
    args = arguments(calls[0])
    names = [_writer(args[part], weights) for part in ("query", "key", "value")]
    query, key, value = names
    if query is None or key is None or value is None or len({query, key, value}) < 3:
        return None
    written = {slot.parameter for slot in group.writers if slot.kind == "weight"}
    return (query, key, value) if {query, key} <= written <= {query, key, value} else None


def _writer(node: Node, weights: Weights) -> str | None:
    """Trace an activation back to the linear map that writes it and nothing else."""
    while len(node.users) == 1 and operator_name(node) in MOVES:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    if len(node.users) != 1 or operator_name(node) != "linear":
        return None
    program = weights.graph.program
    name = program.parameter(node.args[1])
    calls = sum(n.op == "call_function" and node.args[1] in n.args for n in program.nodes)
    known = name in weights.graph.layers and name not in weights.statistics
    return name if known and calls == 1 else None


def _rows(group: ChannelGroup, name: str, weights: Weights) -> Tensor | None:
    """List the positions (heads, n) of each head's width on a weight, if they fill the axis."""
    slot = next((s for s in group.slots if s.parameter == name), None)
    if slot is None:
        return None
    blocks = weights.graph.blocks(slot, group.id, weights.sizes)
    rows = torch.from_numpy(positions(blocks, weights.sizes[group.id])).T
    plain = len(blocks) == 1 and blocks[0].inner == 1 and bool((rows[:, 0].diff() > 0).all())
    whole = rows.numel() == weights.state[name].shape[slot.axis]
    return rows if plain and whole else None


def _own(matrix: Tensor, places: Tensor) -> Tensor:
    """Take the diagonal block of each head from a matrix: (heads, n, n)."""
    return matrix[places[:, :, None], places[:, None, :]]


def _roots(matrix: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return symmetric roots (heads, n, n) of covariances with a ridge, and their inverses."""
    level = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    sizes = (values.clamp_min(0) + max(ridge, 1e-9) * level[:, None]).sqrt()[:, None]
    return (vectors * sizes) @ vectors.mT, (vectors / sizes) @ vectors.mT
