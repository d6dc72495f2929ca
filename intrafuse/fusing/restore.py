"""Restore the variance of activations after averaging: with data (REPAIR) or from weights.

The activations of an averaged network vary less than those of its members (variance collapse). Here
every layer's outputs are rescaled to the mean of the members' means and deviations. Letters, for
one output:

    w_k weight of network k    mu_k, s_k  its mean and standard deviation    M = sum of w_k mu_k
    S = sum of w_k s_k, the target    m, s  mean and deviation that the fused network has
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.fusing.members import Member
from intrafuse.fusing.observe import Point, points
from intrafuse.support.batches import batches
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.walk import measure, walk

__all__ = ["analytic_restore", "reestimate"]

BATCHES = 64  # most batches of the data to use
FLOOR = 1e-5  # smallest variance of an output, as a share of its layer's mean variance
Told = dict[str, tuple[Tensor, Tensor]]  # bias name -> mean and deviation (outputs,)


def reestimate(model: nn.Module, fused: Weights, members: Sequence[Member], data: Any) -> None:
    """Rescale the outputs of every layer to the mean statistics of the members (REPAIR).

    Jordan et al., ICLR 2023, arXiv 2211.08403. The effect of a batch norm with re-estimated
    statistics is written into the weights of the layer that the norm was folded into. Layers
    without a norm are rescaled in the same way. A layer that is called twice, or shares its
    weight, does not change.

    Args:
        model: the module of the reference network, for its code.
        fused: the fused tensors; they are rescaled.
        members: the networks.
        data: batches of inputs, or of (inputs, labels); labels are ignored. The data is read once
            for each network and once for the fused one; at most 64 batches are used.

    Raises:
        IntrafuseError: the data holds no batch, or a batch holds a single value for a channel.
    """
    targets = _targets(members, data)
    tied = set(fused.graph.aliases.values())
    watched = [
        point
        for point in points(fused.graph, norms=True)
        if point.bias in targets and point.weight not in tied and point.bias not in tied
    ]
    sums: dict[str, Sums] = {}

    def correct(point: Point, output: Tensor) -> Tensor:
        rows = _rows(point, output)
        if len(rows) < 2:
            raise IntrafuseError(
                "repair needs several samples in every batch", value=len(rows), layer=point.name
            )
        mean, variance = rows.mean(0).cpu(), rows.var(0, correction=0).cpu()
        sums.setdefault(point.bias, Sums()).add(mean[None], variance[None])
        gain, shift = _correction(mean, variance, *targets[point.bias])
        lines = output.movedim(point.axis, -1)
        return (lines * gain.to(lines) + shift.to(lines)).movedim(-1, point.axis)

    seen = {point.key: partial(correct, point) for point in watched}
    walk(model, [fused], _inputs(data, model), seen)
    for point in watched:
        if point.bias in sums:
            known = sums[point.bias]
            gain, shift = _correction(known.mean(0), known.mean(1), *targets[point.bias])
            _rescale(fused, point, gain, shift)


def analytic_restore(fused: Weights, members: Sequence[Member], *, rescale: bool = True) -> None:
    """Rescale outputs of layers with batch norm to the members' mean statistics, without data.

    The batch norms tell mu_k and s_k. The correlation between outputs of two networks is taken as
    the cosine of the weights that write them: s^2 = sum over k, l of w_k w_l s_k s_l cos(k, l),
    with negative cosines as zero (compare Fold-AR, Wang et al., ICLR 2025, arXiv 2502.10216).
    Layers without a batch norm do not change.

    Args:
        fused: the fused tensors; they are rescaled, and their statistics are noted.
        members: the networks.
        rescale: whether to rescale; otherwise statistics are only noted.
    """
    parts = [(member.share, member.aligned()) for member in members]
    for name, layer in fused.graph.layers.items():
        if any(
            len(_statistics(p, name)) != p.state[name].shape[layer.output_axis] for _, p in parts
        ):
            continue  # unknown statistics, or a grouped transposed convolution
        mean = torch.stack([w * p.statistics[name][0].double() for w, p in parts]).sum(0)
        spread = torch.stack([w * p.statistics[name][1].double() for w, p in parts])
        rows = [p.state[name].movedim(layer.output_axis, 0).flatten(1).double() for _, p in parts]
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=2)
        cosine = torch.einsum("koi,loi->klo", unit, unit).clamp_min(0)
        deviation = torch.einsum("ko,lo,klo->o", spread, spread, cosine).sqrt()
        target = spread.sum(0)
        if rescale:
            gain = torch.where(deviation > 0, target / deviation.clamp_min(1e-300), 1.0)
            fused.rescale(name, gain, (1 - gain) * mean)
            deviation = target
        fused.note(name, mean.float(), deviation.float())


def _statistics(weights: Weights, name: str) -> Tensor:
    return weights.statistics.get(name, (torch.zeros(0),))[0]


def _correction(
    mean: Tensor, variance: Tensor, wanted: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gain and shift that turn a mean and variance into a target mean and deviation."""
    floor = FLOOR * float(variance.mean())
    gain = torch.where(variance > 0, deviation / (variance + floor).sqrt(), 1.0)
    return gain, wanted - gain * mean


def _rescale(weights: Weights, point: Point, gain: Tensor, shift: Tensor) -> None:
    if point.key == point.weight:
        weights.rescale(point.weight, gain, shift)
        return
    scale, offset = weights.state[point.weight], weights.state[point.bias]
    moved = offset * gain.to(offset) + shift.to(offset)
    weights.put({point.weight: scale * gain.to(scale), point.bias: moved})


def _rows(point: Point, output: Tensor) -> Tensor:
    """Order the output of a point as (samples, channels), in float64."""
    if not torch.isfinite(output).all():
        raise IntrafuseError("activations must be finite on the data", layer=point.name)
    return output.movedim(point.axis, -1).flatten(0, -2).double()


def _inputs(data: Iterable, model: nn.Module) -> Iterator[Any]:
    for inputs, _ in batches(data, model, purpose="repair of batch norm", limit=BATCHES):
        yield inputs


def _targets(members: Sequence[Member], data: Iterable) -> Told:
    """Measure M and S of every point, in the channel order of the reference."""
    total: Told = {}
    for member in members:
        for name, told in _measured(member, data).items():
            moved = [_moved(member, name, line) * member.share for line in told]
            old = total.get(name)
            pair = moved if old is None else [a + b for a, b in zip(old, moved, strict=True)]
            total[name] = pair[0], pair[1]
    return total


def _moved(member: Member, bias: str, line: Tensor) -> Tensor:
    part = Weights(member.weights.graph, {bias: line})
    for merge_map in member.maps:
        part.merge(
            MergeMap(
                merge_map.group, merge_map.encode, merge_map.decode, merge_map.carry, merge_map.keep
            )
        )
    return part.state[bias]


def _measured(member: Member, data: Iterable) -> Told:
    """Measure mean and deviation (outputs,) of each point that is called once per batch."""
    watched = {point.key: point for point in points(member.weights.graph, norms=True)}
    ordered = {key: partial(_rows, point) for key, point in watched.items()}
    inputs = _inputs(data, member.model)
    sums, batches = measure(member.model, member.weights, inputs, ordered)
    once = {watched[k].bias: known for k, known in sums.items() if known.additions == batches}
    return {name: (known.mean(), known.variance().sqrt()) for name, known in once.items()}
