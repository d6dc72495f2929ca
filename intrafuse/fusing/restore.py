"""Restore what averaging takes from activations: with data (REPAIR), or by how weights correlate.

Averaged networks put out less spread than each of their parts (variance collapse). Every layer's
outputs are brought to the mean of the networks' own means and deviations. Letters, for one output:

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
from intrafuse.fusing.observe import Point, observing, points
from intrafuse.support.batches import batches
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.watch import measure, run
from intrafuse.surgery.weights import Weights

__all__ = ["analytic_restore", "reestimate"]

BATCHES = 64  # of the data that are used
FLOOR = 1e-5  # share of a layer's mean variance that every output counts to have at least
Told = dict[str, tuple[Tensor, Tensor]]  # by name of the bias: mean and deviation (outputs,)


def reestimate(model: nn.Module, fused: Weights, members: Sequence[Member], data: Any) -> None:
    """Give the outputs of every layer the mean networks' statistics (REPAIR).

    Jordan et al., ICLR 2023, arXiv 2211.08403: what batch norm does when its statistics are
    estimated anew, written into the weights of the layer that it was folded into. Layers without
    a norm get the same. A layer that is called twice, or shares its weight, stays as it is.

    Args:
        model: the module of the reference network, for its code.
        fused: the fused tensors; they are rescaled.
        members: the networks.
        data: batches of inputs, or of (inputs, labels); labels are ignored. It is read once for
            each network, and once more; 64 batches are used.

    Raises:
        IntrafuseError: the data holds no batch, or a batch holds a single value for a channel.
    """
    targets = _targets(members, data)
    tied = set(fused.graph.aliases.values())
    watched = [
        point
        for point in points(fused.graph, model, norms=True)
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

    network = install(model, fused)
    with observing(network, watched, correct):
        run(network, _inputs(data, network))
    for point in watched:
        if point.bias in sums:
            known = sums[point.bias]
            gain, shift = _correction(known.mean(0), known.mean(1), *targets[point.bias])
            _rescale(fused, point, gain, shift)


def analytic_restore(fused: Weights, members: Sequence[Member], *, rescale: bool = True) -> None:
    """Give the outputs of layers behind batch norm the mean networks' statistics, without data.

    The batch norms told mu_k and s_k. Outputs of two networks count as correlated as the weights
    that write them: s^2 = sum over k, l of w_k w_l s_k s_l cos(k, l), negative cosines as none
    (compare Fold-AR, Wang et al., ICLR 2025, arXiv 2502.10216). Layers without a batch norm stay.

    Args:
        fused: the fused tensors; they are rescaled, and their statistics are noted.
        members: the networks.
        rescale: else statistics are noted only.
    """
    parts = [(member.share, member.aligned()) for member in members]
    for name, layer in fused.graph.layers.items():
        if any(
            len(_statistics(p, name)) != p.state[name].shape[layer.output_axis] for _, p in parts
        ):
            continue  # nothing was told, or not of a grouped transposed convolution
        mean = torch.stack([w * p.statistics[name][0].double() for w, p in parts]).sum(0)
        spread = torch.stack([w * p.statistics[name][1].double() for w, p in parts])
        rows = [p.state[name].movedim(layer.output_axis, 0).flatten(1).double() for _, p in parts]
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=2)
        cosine = torch.einsum("koi,loi->klo", unit, unit).clamp_min(0)
        found = torch.einsum("ko,lo,klo->o", spread, spread, cosine).sqrt()
        target = spread.sum(0)
        if rescale:
            gain = torch.where(found > 0, target / found.clamp_min(1e-300), 1.0)
            fused.rescale(name, gain, (1 - gain) * mean)
            found = target
        fused.note(name, mean.float(), found.float())


def _statistics(weights: Weights, name: str) -> Tensor:
    return weights.statistics.get(name, (torch.zeros(0),))[0]


def _correction(
    mean: Tensor, variance: Tensor, wanted: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gain and the shift that turn one mean and variance into those wanted."""
    floor = FLOOR * float(variance.mean())
    gain = torch.where(variance > 0, deviation / (variance + floor).sqrt(), 1.0)
    return gain, wanted - gain * mean


def _rescale(weights: Weights, point: Point, gain: Tensor, shift: Tensor) -> None:
    if point.is_layer:
        weights.rescale(point.weight, gain, shift)
        return
    scale, offset = weights.state[point.weight], weights.state[point.bias]
    moved = offset * gain.to(offset) + shift.to(offset)
    weights.put({point.weight: scale * gain.to(scale), point.bias: moved})


def _rows(point: Point, output: Tensor) -> Tensor:
    """Order what a point puts out as (samples, channels), in float64."""
    if not torch.isfinite(output).all():
        raise IntrafuseError("activations must be finite on the data", layer=point.name)
    return output.movedim(point.axis, -1).flatten(0, -2).double()


def _inputs(data: Iterable, model: nn.Module) -> Iterator[Any]:
    for inputs, _ in batches(data, model, purpose="repair of batch norm", limit=BATCHES):
        yield inputs


def _targets(members: Sequence[Member], data: Iterable) -> Told:
    """Measure M and S of every point, in the places of the reference."""
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
    for step in member.maps:
        part.merge(MergeMap(step.group, step.encode, step.decode, step.carry, step.keep))
    return part.state[bias]


def _measured(member: Member, data: Iterable) -> Told:
    """Measure mean and deviation (outputs,) of each point that a network calls once."""
    network = install(member.model, member.weights)
    watched = [
        (point.bias, network.get_submodule(point.name), partial(_rows, point))
        for point in points(member.weights.graph, network, norms=True)
    ]
    sums, batches = measure(network, watched, _inputs(data, network))
    once = {name: known for name, known in sums.items() if known.additions == batches}
    return {name: (known.mean(), known.variance().sqrt()) for name, known in once.items()}
