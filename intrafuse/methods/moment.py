"""Moment matching: every reader re-solves for itself how to read the old activations from the new.

Letters, for one group of n channels that keeps m, and one reader:

    h, h'  old and new activations (n,), (m,)       V  the reader's weight (outputs, n, taps)
    A = Cov(h, h') (n, m)    B = Cov(h', h') (m, m)  K  correlation between taps
    Q = A (B + ridge)^-1     V' = V Q               gain = sqrt(Var_old / Var_new), shift: means
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from intrafuse.context import Context
from intrafuse.errors import IntrafuseError
from intrafuse.graph.axes import leaves
from intrafuse.graph.groups import ChannelGroup
from intrafuse.merge import MergeMap
from intrafuse.methods.folding import Folding, restored_variance
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.select import most_important
from intrafuse.methods.settings import check_choices
from intrafuse.moments.calibrate import measured_readings
from intrafuse.moments.readers import Reading, reader_taps, readings
from intrafuse.moments.taps import output_variance
from intrafuse.weights import Weights

__all__ = ["Moment", "explaining_channels", "read_back"]

Transport = Literal["none", "intra-fusion", "folding"]
Source = Literal["analytic", "calibration"]
Choice = Literal["greedy", "importance"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Match moments: keep or merge channels, then re-solve each reader (ours; DESIGN section 6).

    No data is needed where a normalisation layer stands before the activation: mean and spread
    come from the norm, correlations from the weights. Without one, inputs of unit variance are
    assumed and propagated.

    Attributes:
        source: `analytic` moments come from the weights alone; `calibration` measures them on
            unlabelled data: the original network against the network as pruned so far.
        transport: merge writers by the map of this method (`folding` keeps most accuracy); with
            `none` channels are selected.
        choice: which channels survive where they are selected: `greedy` takes, one after the
            other, the channel that explains most reader-weighted covariance of what is left
            (pivoted Cholesky); `importance` takes the most important ones.
        ridge: added to the covariance, in units of its mean diagonal.
        max_gain: largest gain on a reader's outputs; 0 switches gains off.
        length: how far the correlation between neighbouring positions reaches, in positions.
    """

    name: ClassVar[str] = "moment"
    folds_batchnorm: ClassVar[bool] = True
    order: ClassVar[Literal["forward", "backward"]] = "forward"

    source: Source = "analytic"
    choice: Choice = "greedy"
    transport: Transport = "folding"
    ridge: float = 1e-3
    max_gain: float = 3.0
    length: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, {"source": Source, "choice": Choice, "transport": Transport})
        for setting in ("ridge", "max_gain", "length"):
            if not getattr(self, setting) >= 0:
                raise IntrafuseError(
                    f"{setting} must be not negative", value=getattr(self, setting), usage=True
                )

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        if self.transport != "none":
            return self._merged(group, scores, width, context)
        found = self._readings(group, context.weights, context)
        if self.choice == "importance" or not found:
            keep = most_important(scores, width)
        else:
            keep = explaining_channels(list(found.values()), width)
        step = MergeMap.select(group.name, len(scores), keep)
        chosen = {name: reading.narrowed(slice(None), keep) for name, reading in found.items()}
        return self._read_out(step, chosen, context)

    def _merged(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Merge writers by another method's map; old and new channels side by side give A and B."""
        if self.transport == "folding":
            step = Folding()(group, scores, width, context)
        else:
            step = IntraFusion(normalisation="barycentric")(group, scores, width, context)
            gain, shift = restored_variance(group, context, step.encode)
            step = replace(step, writer_gain=gain, writer_shift=shift)
        n = len(scores)
        both = context.weights.snapshot()
        both.merge(_beside(step))
        found = self._readings(group, both, context)
        slots = {slot.parameter: slot for slot in group.readers}
        chosen = {}
        for name, reading in found.items():
            taps, _, _ = reader_taps(group, slots[name], context.weights, self.length)
            reading = replace(reading.narrowed(slice(0, n), slice(n, None)), taps=taps)
            if len(reading.rest) != len(taps):  # a reader that also writes the group was widened
                nothing = torch.zeros(len(taps)).double()
                reading = replace(reading, rest=nothing, rest_mean=nothing)
            chosen[name] = reading
        return self._read_out(step, chosen, context)

    def _readings(
        self, group: ChannelGroup, weights: Weights, context: Context
    ) -> dict[str, Reading]:
        if self.source == "analytic":
            return readings(group, weights, length=self.length)
        if context.data is None:
            raise IntrafuseError(
                "calibration needs unlabelled data",
                usage=True,
                remedy="give data= (on the command line --data)",
            )
        return measured_readings(group, context.model, weights, context.data, length=self.length)

    def _read_out(self, step: MergeMap, found: dict[str, Reading], context: Context) -> MergeMap:
        readers, gains, shifts = {}, {}, {}
        for name, reading in found.items():
            matrix, gain, shift = read_back(reading, ridge=self.ridge, max_gain=self.max_gain)
            readers[name] = matrix.float()
            graph = context.weights.graph
            layer = graph.layers[name]
            written = graph.axes[name][layer.output_axis]
            group = graph.by_name[step.group].id
            if layer.bias is None or reading.calls != 1 or group in leaves(written):
                continue  # no place for a shift, other calls, or outputs that are merged as well
            bias = context.weights.state.get(layer.bias)
            if bias is not None:  # rescaling multiplies the bias too
                shift = shift + (1 - gain) * bias.double().cpu()
            gains[name], shifts[name] = gain.float(), shift.float()
        return replace(step, readers=readers, gain=gains, shift=shifts)


def _beside(step: MergeMap) -> MergeMap:
    """Make the map that keeps the old channels and puts the new ones behind them.

    Readers go on reading the old ones.
    """
    n = step.size
    eye, nothing = torch.eye(n), torch.zeros(n, step.width)

    def extended(values: Mapping[str, Tensor], fill: float) -> dict[str, Tensor]:
        return {
            name: torch.cat([torch.full((n, *line.shape[1:]), fill), line])
            for name, line in values.items()
        }

    return MergeMap.linear(
        step.group,
        torch.cat([eye, step.encode]),
        torch.cat([eye, nothing], 1),
        writer_gain=extended(step.writer_gain, 1.0),
        writer_shift=extended(step.writer_shift, 0.0),
    )


def read_back(
    reading: Reading, *, ridge: float = 1e-3, max_gain: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve how a reader reads the old activations from the new ones.

    Args:
        reading: moments of old and new activations, and the reader's weight.
        ridge: added to B, in units of its mean diagonal.
        max_gain: largest gain; 0 gives gains of one.

    Returns:
        Q (n, m), gain (outputs,) and shift (outputs,), float64. Without spread nothing is
        learnt: then Q is zero, and the shift alone carries the mean.

    Raises:
        IntrafuseError: a moment is not finite.
    """
    a, b = reading.cross, reading.new
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise IntrafuseError("moments must be finite", layer=reading.layer)
    level = b.diagonal().mean()
    eye = torch.eye(len(b), dtype=b.dtype)
    if float(level) <= 0:
        matrix = torch.zeros_like(a)
    else:
        matrix = torch.linalg.solve(b + max(ridge, 1e-9) * level * eye, a.T).T
    taps = torch.einsum("oit,ij->ojt", reading.taps, matrix)
    old = output_variance(reading.taps, reading.kernel, reading.old) + reading.rest
    new = output_variance(taps, reading.kernel, b) + reading.rest
    gain = torch.ones_like(old)
    if max_gain > 0:
        known = new > 1e-12 * old.clamp_min(1e-300)
        gain = torch.where(known, (old / new.clamp_min(1e-300)).sqrt().clamp_max(max_gain), 1.0)
    rest = reading.rest_mean
    shift = reading.taps.sum(2) @ reading.old_mean + rest
    return matrix, gain, shift - gain * (taps.sum(2) @ reading.new_mean + rest)


def explaining_channels(found: list[Reading], width: int) -> Tensor:
    """Choose, one after the other, the channel that explains most of what the readers read.

    Args:
        found: what each reader knows of the group; its `old` covariance is used.
        width: m.

    Returns:
        Ascending indices (m,).
    """
    left = [reading.old.numpy().copy() for reading in found]
    weight = []
    for reading, covariance in zip(found, left, strict=True):
        squares = reading.taps.square().sum((0, 2)).numpy()
        total = float(squares @ np.diag(covariance))
        weight.append(squares / total if total > 0 else squares)
    floors = [1e-9 * float(np.diag(c).mean()) + 1e-300 for c in left]
    chosen: list[int] = []
    for _ in range(width):
        score = np.zeros(len(left[0]))
        for covariance, squares, floor in zip(left, weight, floors, strict=True):
            own = np.diag(covariance)
            gain = (squares @ np.square(covariance)) / np.maximum(own, floor)
            score += np.where(own > floor, gain, 0.0)
        score[chosen] = -1.0
        best = int(score.argmax())
        chosen.append(best)
        for covariance, floor in zip(left, floors, strict=True):
            if covariance[best, best] > floor:
                line = covariance[best]
                covariance -= np.outer(line, line / line[best])
    return torch.tensor(sorted(chosen))
