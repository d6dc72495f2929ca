"""Readouts: re-solve each reader of a group for the old activations, and predict its error.

Letters, for one group of n channels that keeps m, and one reader:

    h, h'  old and new activations (n,), (m,)       V  the reader's weight (outputs, n, taps)
    A = Cov(h, h') (n, m)    B = Cov(h', h') (m, m)  K  correlation between taps
    Q = A (B + ridge)^-1     V' = V Q               gain = sqrt(Var_old / Var_new), shift: means
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from intrafuse.graph.axes import leaves
from intrafuse.moments.gaussian import WIDE
from intrafuse.moments.readers import Reading
from intrafuse.moments.regression import ridge_solve
from intrafuse.moments.taps import decoded, output_variance
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["beside", "predicted_error", "read_back", "with_readout"]


def read_back(
    reading: Reading, *, ridge: float = 1e-3, max_gain: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the readout of the old activations from the new ones.

    Args:
        reading: moments of old and new activations, and the reader's weight.
        ridge: added to B, in units of its mean diagonal.
        max_gain: largest gain; 0 gives gains of one.

    Returns:
        Q (n, m), gain (outputs,) and shift (outputs,), float64. If the new activations have no
        variance, Q is zero, and only the shift carries the mean.

    Raises:
        IntrafuseError: a moment is not finite.
    """
    a, b = reading.cross, reading.new
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise IntrafuseError("moments must be finite", layer=reading.layer)
    if len(b) >= WIDE and ridge >= 1e-3:  # then float32 is accurate enough
        level = b.diagonal().mean().clamp_min(1e-300)
        a, b = (a / level).float(), (b / level).float()
    matrix = ridge_solve(b, a.T, ridge).T.double()
    return (matrix, *matched(reading, matrix, max_gain))


def matched(reading: Reading, matrix: Tensor, max_gain: float) -> tuple[Tensor, Tensor]:
    """Compute gain and shift (outputs,) that restore mean and variance of a reader's outputs."""
    taps = decoded(reading.taps, matrix)
    old = reading.output_variance
    new = output_variance(taps, reading.kernel, reading.new) + reading.rest
    gain = torch.ones_like(old)
    if max_gain > 0:
        known = new > 1e-12 * old.clamp_min(1e-300)
        gain = torch.where(known, (old / new.clamp_min(1e-300)).sqrt().clamp_max(max_gain), 1.0)
    rest = reading.rest_mean
    shift = reading.taps.sum(2) @ reading.old_mean + rest
    return gain, shift - gain * (taps.sum(2) @ reading.new_mean + rest)


def with_readout(
    merge_map: MergeMap,
    found: Mapping[str, Reading],
    weights: Weights,
    *,
    ridge: float = 1e-3,
    max_gain: float = 3.0,
    solve: bool = True,
) -> MergeMap:
    """Return a map with the readouts, gains and shifts that follow from the moments.

    Args:
        merge_map: the map of the group.
        found: moments of old and new channels, by the name of each reader's weight.
        weights: the tensors as merged so far.
        ridge, max_gain: see `read_back`.
        solve: whether to solve Q for each reader; otherwise the map's own decode stays, and only
            gain and shift are computed.
    """
    readers, gains, shifts = {}, {}, {}
    graph = weights.graph
    for name, reading in found.items():
        if solve:
            matrix, gain, shift = read_back(reading, ridge=ridge, max_gain=max_gain)
            readers[name] = matrix.float()
        else:
            gain, shift = matched(reading, merge_map.decoder(name).double(), max_gain)
        layer = graph.layers[name]
        written = graph.axes[name][layer.output_axis]
        own = graph.by_name[merge_map.group].id
        if layer.bias is None or reading.calls != 1 or own in leaves(written):
            continue  # it has no bias, is called again elsewhere, or its outputs are merged too
        bias = weights.state.get(layer.bias)
        if bias is not None:  # rescaling multiplies the bias too
            shift = shift + (1 - gain) * bias.double().cpu()
        gains[name], shifts[name] = gain.float(), shift.float()
    return replace(
        merge_map,
        readers={**merge_map.readers, **readers},
        gain={**merge_map.gain, **gains},
        shift={**merge_map.shift, **shifts},
    )


def predicted_error(merge_map: MergeMap, found: Mapping[str, Reading], weights: Weights) -> float:
    """Predict the error of the outputs of a group's readers after merging.

    The agreement of old and new output o, o' of a reader is Lin's concordance coefficient, 1 for
    equal outputs and 0 for unrelated ones:

        2 Cov(o, o') / (Var(o) + Var(o') + (E o - E o')^2)

    Returns:
        The mean of 1 - agreement over readers, each output weighted by its old variance.
    """
    errors = [_reader_error(merge_map, name, reading, weights) for name, reading in found.items()]
    return sum(errors) / len(errors) if errors else 0.0


def _reader_error(merge_map: MergeMap, name: str, reading: Reading, weights: Weights) -> float:
    new_taps = decoded(reading.taps, merge_map.decoder(name).double())
    zero = torch.zeros(len(reading.taps)).double()
    gain = merge_map.gain[name].double() if name in merge_map.gain else zero + 1
    shift = merge_map.shift[name].double() if name in merge_map.shift else zero
    bias = weights.state.get(weights.graph.layers[name].bias or "")
    rest = reading.rest_mean + (zero if bias is None else bias.double().cpu())
    old = reading.output_variance
    new = output_variance(new_taps, reading.kernel, reading.new) + reading.rest
    mixed = decoded(reading.taps, reading.cross) @ reading.kernel
    both = gain * ((mixed * new_taps).sum((1, 2)) + reading.rest)
    before = reading.taps.sum(2) @ reading.old_mean + rest
    after = gain * (new_taps.sum(2) @ reading.new_mean + rest) + shift
    whole = old + gain.square() * new + (before - after).square()
    agreement = torch.where(whole > 0, 2 * both / whole.clamp_min(1e-300), 1.0)
    agreement = agreement.clamp(-1, 1)  # rounding, if variances are close to zero
    total = old.sum()
    return float((old @ (1 - agreement)) / total) if total > 0 else 0.0


def beside(group: str, size: int, maps: Sequence[MergeMap]) -> MergeMap:
    """Make a map that keeps the old channels and appends those of several maps.

    Args:
        group: name of the group.
        size: n.
        maps: maps of this group.

    Returns:
        A map from n to n + m + ... channels. Readers still read the old channels.
    """
    encode = torch.cat([torch.eye(size), *(merge_map.encode for merge_map in maps)])
    decode = torch.eye(size, len(encode))
    return MergeMap.linear(
        group,
        encode,
        decode,
        writer_gain=_stacked(size, maps, "writer_gain", 1.0),
        writer_shift=_stacked(size, maps, "writer_shift", 0.0),
    )


def _stacked(size: int, maps: Sequence[MergeMap], part: str, fill: float) -> dict[str, Tensor]:
    """Append each writer's values in several maps to neutral values for the old channels."""
    held = [getattr(merge_map, part) for merge_map in maps]
    stacked = {}
    for name in dict.fromkeys(name for values in held for name in values):
        shape = next(values[name].shape[1:] for values in held if name in values)
        lines = [torch.full((size, *shape), fill)]
        for merge_map, values in zip(maps, held, strict=True):
            lines.append(values.get(name, torch.full((merge_map.width, *shape), fill)))
        stacked[name] = torch.cat(lines)
    return stacked
