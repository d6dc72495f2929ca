"""Align the channels of one network with those of a reference, group by group.

Letters, for one group: m channels of the reference, n of the other network, s a side (a layer that
writes, filters, reads or outputs the channels):

    X_s (n, F_s)  features of the other network    Y_s (m, F_s)  features of the reference
    C (n, m)  cost, the sum over s of |x_i - y_j|^2 / mean_j |y_j|^2: all sides weigh the same
    T (n, m)  transport    P (m, n)  means of channels, for writers    Q (n, m)  for readers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from intrafuse.graph.axes import Sum, Tree, leaves
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.methods.transport import Transport, assignment, encode_matrix, transport
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["Alignment", "align"]

Solver = Literal["ot", "assignment"]
Sides = Mapping[str, Tensor]  # by side: (channels, F)
SWEEPS = {"ot": 3, "assignment": 100}  # upper limits; an assignment usually stops far earlier
QUANTILES = 33  # number of quantiles to describe a row whose columns are in unknown order


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the channels of one network correspond to those of the reference.

    Attributes:
        maps: one merge map for each group, from the network's widths to the reference's.
        distances: the cost of each group's map over the cost of a random map, by group name: 0 for
            equal channels, 1 if the map is no better than chance.
        sweeps: number of passes over the groups.
    """

    maps: Mapping[str, MergeMap]
    distances: Mapping[str, float]
    sweeps: int


def align(
    reference: Weights,
    weights: Weights,
    *,
    solver: Solver,
    activations: tuple[Mapping[str, Sides], Mapping[str, Sides]] | None = None,
    regularisation: float | None = None,
    seed: int = 0,
) -> Alignment:
    """Align one network with the reference.

    The first sweep visits groups from input to output. It compares the weights that write a group
    after mapping their input axes. A layer whose inputs come later in that order (the branches of
    a residual stream) is compared from the second sweep on. An assignment continues in random
    order and compares the readers too, until no permutation changes (Git Re-Basin, Ainsworth et
    al., ICLR 2023, arXiv 2209.04836, algorithm 1). Transport follows Singh and Jaggi, NeurIPS
    2020, arXiv 1910.05653, section 4.

    Args:
        reference: the tensors of the reference, batch norm folded.
        weights: the tensors of the other network, batch norm folded.
        solver: `ot` or `assignment`; the latter needs equal widths.
        activations: `observe.activations` of the reference and of the other network. If given,
            only activations are compared, in a single sweep.
        regularisation: regularization of the transport, see `transport`.
        seed: seeds the order of groups in later sweeps of an assignment.
    """
    names = [group.name for group in reference.graph.groups]
    maps: dict[str, MergeMap] = {}
    distances: dict[str, float] = {}
    random = np.random.default_rng(seed % 2**63)
    sweep = 0
    for sweep in range(SWEEPS[solver]):
        changed, partial = False, False
        readers = solver == "assignment" and sweep > 0
        order = random.permutation(names).tolist() if readers else names
        for name in order:
            if activations is not None:
                x, y = activations[1][name], activations[0][name]
            else:
                x, y, complete = _compared(name, reference, weights, maps, readers)
                partial |= not complete
            merge_map, distances[name] = _solve(name, _cost(x, y), solver, regularisation)
            old = maps.get(name)
            changed |= old is None or not torch.equal(old.encode, merge_map.encode)
            maps[name] = merge_map
        again = partial or solver == "assignment"
        if activations is not None or not changed or not again:
            break
    return Alignment({name: maps[name] for name in names}, distances, sweep + 1)


def _solve(
    name: str, cost: np.ndarray, solver: Solver, regularisation: float | None
) -> tuple[MergeMap, float]:
    """Return the map of one group (n to m channels) and its relative cost."""
    n, m = cost.shape
    mu, nu = np.full(n, 1 / n), np.full(m, 1 / m)
    if solver == "assignment":
        matrix = np.zeros((n, m))
        matrix[np.arange(n), assignment(cost)] = 1 / n
        solution = Transport(matrix, cost, mu, nu)
    else:
        solution = transport(cost, mu, nu, regularisation=regularisation)
        matrix = np.where(solution.matrix < 1e-9 / max(n, m), 0.0, solution.matrix)  # drop rounding
        solution = Transport(matrix, cost, mu, nu)
    # P takes means. Q reads each channel of the other network from the targets of its mass.
    encode = encode_matrix(solution.matrix, "barycentric")
    merge_map = MergeMap.linear(name, encode, encode_matrix(solution.matrix, "paper").T)
    return merge_map.check(), solution.value / max(float(cost.mean()), 1e-300)


def _cost(x: Sides, y: Sides) -> np.ndarray:
    """Sum the squared distances C (n, m) over the sides, in float64."""
    total: Tensor | float = 0.0
    for side in y:
        a, b = x[side].double(), y[side].double()
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        level = float(b.square().sum(1).mean())
        total = total + squares.clamp_min(0) / (level or 1.0)
    assert isinstance(total, Tensor)
    return total.cpu().numpy()


# --- features of weights ------------------------------------------------------------------------


def _compared(
    name: str, reference: Weights, weights: Weights, maps: Mapping[str, MergeMap], readers: bool
) -> tuple[Sides, Sides, bool]:
    """Describe the channels of a group in both networks by the weights of each layer.

    Returns:
        X and Y by layer and role, and whether all layers could be compared, except those that read
        and write the same group.
    """
    own, other = reference.graph.by_name[name], weights.graph.by_name[name]
    slots = [
        slot
        for slot in own.slots
        if _counts(slot, reference, readers)
        and slot.parameter in reference.state
        and slot.parameter in weights.state
    ]
    meets = {slot: _beside(slot, own, reference) for slot in slots}
    aligned = {reference.graph.by_name[group].id for group in maps} - {own.id}
    clear = [slot for slot in slots if meets[slot] <= aligned]
    complete = all(slot in clear or own.id in meets[slot] for slot in slots)
    blurred = not any(slot.kind != "bias" for slot in clear)
    if blurred:
        clear = slots
    part = Weights(weights.graph, {s.parameter: weights.state[s.parameter] for s in clear})
    for merge_map in maps.values():
        if merge_map.group != name and not blurred:
            part.merge(merge_map)
    pieces: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
    for slot in clear:
        twin = next(s for s in other.slots if (s.parameter, s.axis) == (slot.parameter, slot.axis))
        rows = part.rows(other, twin).cpu(), reference.rows(own, slot).cpu()
        if blurred:
            rows = _quantiles(rows[0]), _quantiles(rows[1])
        for into, row in zip(pieces, rows, strict=True):
            into.setdefault(f"{slot.layer} {slot.role}", []).append(row)
    x, y = ({side: torch.cat(rows, 1) for side, rows in p.items()} for p in pieces)
    return x, y, complete


def _counts(slot: Slot, weights: Weights, readers: bool) -> bool:
    """Tell whether a slot describes channels: writers, filters, and readers if requested."""
    if slot.role == "reader":
        return readers
    layers = weights.graph.layers.values()
    known = slot.role == "writer" or any(slot.parameter in (x.weight, x.bias) for x in layers)
    return known and slot.kind not in ("mean", "variance")


def _beside(slot: Slot, group: ChannelGroup, weights: Weights) -> set[int]:
    """List the groups along the other axes and factors of a channel's elements in one slot."""
    graph = weights.graph
    free = {g.id for g in graph.groups}
    atoms: set[int] = set()
    for axis, tree in enumerate(graph.axes[slot.parameter]):
        atoms |= set(leaves(tree)) if axis != slot.axis else _factors(tree, group.id)
    return atoms & free


def _factors(tree: Tree, atom: int) -> set[int]:
    """List the atoms that share a product with an atom along one axis."""
    if isinstance(tree, int) or atom not in leaves(tree):
        return set()
    if isinstance(tree, Sum):
        return {a for part in tree.parts for a in _factors(part, atom)}
    own = next(i for i, factor in enumerate(tree.factors) if atom in leaves(factor))
    rest = [a for i, factor in enumerate(tree.factors) if i != own for a in leaves(factor)]
    return {*rest, *_factors(tree.factors[own], atom)}


def _quantiles(rows: Tensor) -> Tensor:
    """Describe rows (n, F) independently of their column order: (n, quantiles)."""
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.double)
    ordered = rows.double().sort(1).values
    index = (at * (ordered.shape[1] - 1)).round().long()
    return ordered[:, index]
