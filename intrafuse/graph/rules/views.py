"""Recognize views of parameters: reshaped, permuted, cast, or a part of a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch.fx import Node

from intrafuse.graph.rules.registry import (
    CASTS,
    CUTS,
    JOINS,
    PERMUTATIONS,
    RESHAPES,
    SPLITS,
    Scope,
    compute,
    operator_name,
)
from intrafuse.graph.typed import integers

__all__ = ["Piece", "parameter_pieces", "parameter_view", "permutation"]


def permutation(node: Node) -> list[int]:
    """List the input dimension of each dimension of a permuted tensor."""
    rank = node.all_input_nodes[0].meta["val"].dim()
    sizes = range(2, 2 + rank)  # all different, so that a size identifies its dimension
    moved: torch.Tensor = compute(node, torch.empty(*sizes, device="meta"))
    return [n - 2 for n in moved.shape]


def parameter_view(scope: Scope, node: Node) -> tuple[str, list[int | None]] | None:
    """Return the parameter that a tensor is a view of, and the parameter's axis at each dimension.

    Return None if the tensor is not a view of a parameter, or if its numbers were changed or mixed.
    """
    if node in scope.parameters:
        return scope.parameters[node], list(range(len(scope.shape(node))))
    name = operator_name(node) if node.op == "call_function" else ""
    source: Any = node.args[0] if node.args else None
    if name == "getitem":  # a part of it
        source = source.args[0] if operator_name(source) in SPLITS else None
    known = parameter_view(scope, source) if isinstance(source, Node) else None
    if known is None:
        return None
    parameter, axes = known
    if name in PERMUTATIONS:
        return parameter, [axes[dim] for dim in permutation(node)]
    if name in RESHAPES:
        moved = _reshaped(axes, scope.shape(source), scope.shape(node))
        return None if moved is None else (parameter, moved)
    if name == "select":
        dim = scope.arguments(node)["dim"] % len(axes)
        return parameter, [*axes[:dim], *axes[dim + 1 :]]
    return known if name in CASTS | CUTS | {"getitem"} else None


def _reshaped(
    axes: list[int | None], old: tuple[int, ...], new: tuple[int, ...]
) -> list[int | None] | None:
    """Follow axes when dimensions of size 1 are added, dropped or repeated; None otherwise."""
    if prod(new) != prod(old):  # repeated: align dimensions from the last one
        front = len(new) - len(old)
        pairs = [*zip(axes, old, new[front:], strict=True)]
        if any(n not in (1, m) for _, n, m in pairs):
            return None
        return [None] * front + [axis if n == m else None for axis, n, m in pairs]
    wide = [(axis, n) for axis, n in zip(axes, old, strict=True) if n > 1]
    if old == new or [n for _, n in wide] != [n for n in new if n > 1]:
        return axes if old == new else None
    given = iter(wide)
    return [next(given)[0] if n > 1 else None for n in new]


@dataclass(frozen=True)
class Piece:
    """One parameter in a concatenated vector, or the parameter that the vector is a part of.

    Attributes:
        parameter, axis: the name, and the axis that lies along the vector.
        start: the first position in the vector.
        size: the number of positions in the vector.
    """

    parameter: str
    axis: int
    start: int
    size: int


def parameter_pieces(scope: Scope, node: Node) -> list[Piece] | None:
    """List the parameters in a vector: one parameter or part of one, or several whole ones.

    Return None for any other vector.
    """
    view = parameter_view(scope, node)
    if view is not None:
        (axis,) = view[1]
        size = scope.shape(node)[0]
        return None if axis is None else [Piece(view[0], axis, 0, size)]
    names: list[str] = []
    where = _elements(scope, node, names)
    pieces: list[Piece] = []
    start = 0
    for which, run in groupby([] if where is None else integers(where), lambda n: n >> 32):
        name, got = names[which], [n & 0xFFFFFFFF for n in run]
        if got != [*range(scope.table.measure(scope.parameter_axes[name][0]))]:
            return None
        pieces.append(Piece(name, 0, start, len(got)))
        start += len(got)
    return pieces or None


def _elements(scope: Scope, node: Node, names: list[str]) -> torch.Tensor | None:
    """Compute the source of each element of a concatenated vector: index + (parameter << 32)."""
    if node in scope.parameters:
        if len(scope.shape(node)) != 1:
            return None
        if scope.parameters[node] not in names:
            names.append(scope.parameters[node])
        which = names.index(scope.parameters[node])
        return torch.arange(scope.shape(node)[0]) + (which << 32)
    name = operator_name(node) if node.op == "call_function" else ""
    sources = node.all_input_nodes
    if name in CASTS:
        return _elements(scope, sources[0], names)
    if name == "getitem" and operator_name(sources[0]) in SPLITS:
        whole = _elements(scope, sources[0].all_input_nodes[0], names)
        sizes = [int(part.shape[0]) for part in sources[0].meta["val"]]
        return None if whole is None else whole.split(sizes)[node.args[1]]  # type: ignore[index]
    if name in JOINS:
        pieces = [_elements(scope, source, names) for source in scope.arguments(node)["tensors"]]
        known = [piece for piece in pieces if piece is not None]
        return torch.cat(known) if len(known) == len(pieces) else None
    return None
