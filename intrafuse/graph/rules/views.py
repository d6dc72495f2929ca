"""Tensors that are a parameter seen otherwise: with other dimensions, another type, or in part."""

from __future__ import annotations

from itertools import groupby
from math import prod
from typing import Any

import torch
from torch.fx import Node

from intrafuse.graph.rules.registry import (
    CASTS,
    PERMUTATIONS,
    RESHAPES,
    Scope,
    operator_name,
)

__all__ = ["PARTS", "parameter_pieces", "parameter_view", "permutation"]

PARTS = frozenset(("chunk", "split", "split_with_sizes"))
JOINS = frozenset(("cat", "concat", "concatenate"))


def permutation(node: Node) -> list[int]:
    """List which dimension of its input each dimension of a permuted tensor was."""
    rank = node.all_input_nodes[0].meta["val"].dim()
    sizes = range(2, 2 + rank)  # each another, so that a size tells its dimension
    moved = node.target(  # type: ignore[operator]
        torch.empty(*sizes, device="meta"), *node.args[1:], **node.kwargs
    )
    return [n - 2 for n in moved.shape]


def parameter_view(scope: Scope, node: Node) -> tuple[str, list[int | None]] | None:
    """Name the parameter that a tensor is, with the parameter's axis behind each dimension.

    None where the tensor is no parameter, or one whose numbers were changed or mixed.
    """
    if node in scope.parameters:
        return scope.parameters[node], list(range(len(scope.shape(node))))
    name = operator_name(node) if node.op == "call_function" else ""
    source: Any = node.args[0] if node.args else None
    if name == "getitem":  # a part of it
        source = source.args[0] if operator_name(source) in PARTS else None
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
    return known if name in CASTS or name in ("slice", "narrow", "getitem") else None


def _reshaped(
    axes: list[int | None], old: tuple[int, ...], new: tuple[int, ...]
) -> list[int | None] | None:
    """Follow axes where dimensions of size 1 come, go or are repeated; None for any other shape."""
    if prod(new) != prod(old):  # repeated: dimensions lie over each other from the last one
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


def parameter_pieces(scope: Scope, node: Node) -> list[tuple[str, int]] | None:
    """List the whole vectors that a vector is joined of: name and where each begins.

    None where it is anything else.
    """
    ids: dict[str, int] = {}
    where = _elements(scope, node, ids)
    if where is None or where.dim() != 1:
        return None
    names = [*ids]
    found, at = [], 0
    for which, run in groupby(where.tolist(), lambda n: n >> 32):
        got = [n & 0xFFFFFFFF for n in run]
        name = names[which]
        if got != [*range(scope.table.measure(scope.parameter_axes[name][0]))]:
            return None
        found.append((name, at))
        at += len(got)
    return found


def _elements(scope: Scope, node: Node, ids: dict[str, int]) -> torch.Tensor | None:
    """Compute which element of which vector each element of a tensor is."""
    if node in scope.parameters:
        if len(scope.shape(node)) != 1:
            return None
        which = ids.setdefault(scope.parameters[node], len(ids))
        return torch.arange(scope.shape(node)[0]) + (which << 32)
    name = operator_name(node) if node.op == "call_function" else ""
    if name in CASTS:
        return _elements(scope, node.all_input_nodes[0], ids)
    args = scope.arguments(node) if name in JOINS | PARTS else {}
    if name == "getitem" and operator_name(node.all_input_nodes[0]) in PARTS:
        whole = node.all_input_nodes[0]
        source = _elements(scope, whole.all_input_nodes[0], ids)
        parts = [int(t.shape[0]) for t in whole.meta["val"]]
        return None if source is None else source.split(parts)[node.args[1]]  # type: ignore[index]
    if name in JOINS:
        pieces = [_elements(scope, tensor, ids) for tensor in args["tensors"]]
        return None if any(p is None for p in pieces) else torch.cat(pieces)  # type: ignore[arg-type]
    return None
