"""Restore what averaging takes from activations: with data (REPAIR), or by how weights correlate.

Averaged networks put out less spread than each of their parts (variance collapse). Every layer's
outputs are brought to the mean of the networks' own means and deviations. Letters, for one output:

    w_k weight of network k    mu_k, s_k  its mean and standard deviation    M = sum of w_k mu_k
    S = sum of w_k s_k, the target    m, s  mean and deviation that the fused network has
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.fusing.members import Member
from intrafuse.fusing.observe import Point, observing, points, run
from intrafuse.support.batches import batches
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
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
    sums: dict[str, list[Tensor]] = {}

    def correct(point: Point, output: Tensor) -> Tensor:
        lines = _finite(point, output).movedim(point.axis, -1)
        count = lines.numel() // lines.shape[-1]
        if count < 2:
            raise IntrafuseError(
                "repair needs several samples in every batch", value=count, layer=point.name
            )
        flat = lines.flatten(0, -2).double()
        mean, variance = flat.mean(0).cpu(), flat.var(0, correction=0).cpu()
        parts = [torch.ones(()).to(mean), mean, variance]
        old = sums.get(point.bias)
        sums[point.bias] = (
            parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
        )
        gain, shift = _correction(mean, variance, *targets[point.bias])
        return (lines * gain.to(lines) + shift.to(lines)).movedim(-1, point.axis)

    network = install(model, fused)
    with observing(network, watched, correct):
        run(network, _inputs(data, network))
    for point in watched:
        if point.bias in sums:
            count, mean, variance = sums[point.bias]
            gain, shift = _correction(mean / count, variance / count, *targets[point.bias])
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


def _finite(point: Point, output: Tensor) -> Tensor:
    if not torch.isfinite(output).all():
        raise IntrafuseError("activations must be finite on the data", layer=point.name)
    return output


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
    """Measure mean and deviation (outputs,) of what each point of a network puts out."""
    graph = member.weights.graph
    network = install(member.model, member.weights)
    watched = points(graph, network, norms=True)
    calls: dict[str, int] = {}
    sums: dict[str, list[Tensor]] = {}

    def add(point: Point, output: Tensor) -> None:
        flat = _finite(point, output).movedim(point.axis, -1).flatten(0, -2).double()
        calls[point.bias] = calls.get(point.bias, 0) + 1
        parts = [torch.tensor(float(len(flat))), flat.sum(0).cpu(), flat.square().sum(0).cpu()]
        old = sums.get(point.bias)
        sums[point.bias] = (
            parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
        )

    seen = 0

    def counted() -> Iterator[Any]:
        nonlocal seen
        for batch in _inputs(data, network):
            seen += 1
            yield batch

    with observing(network, watched, add):
        run(network, counted())
    return {name: _moments(*sums[name]) for name in sums if calls[name] == seen}


def _moments(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0).sqrt()
