"""Sources of moments: the weights alone, synthetic inputs, or unlabeled data."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.moments.calibrate import Calibration
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import Reading, Written, reader_taps, readings, written
from intrafuse.moments.readout import beside
from intrafuse.moments.solve import solvable
from intrafuse.moments.synthetic import synthesise
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["MomentSource", "Source"]

SOLVABLE = "layers that are solved later"  # key in a context's cache
Source = Literal["analytic", "synthetic", "calibration"]


@dataclass(frozen=True, kw_only=True)
class MomentSource:
    """The settings of all methods that use moments.

    Attributes:
        source: `analytic` moments come from the weights alone; `synthetic` measures them on
            inputs optimized to fit the batch norms' statistics; `calibration` measures them on
            unlabeled data. Measured moments relate the activations of the original network to
            those of the network as pruned so far.
        ridge: added to the covariance, in units of its mean diagonal.
        max_gain: largest gain on a reader's outputs; 0 switches gains off.
        length: correlation length between neighboring positions, in positions.
        images, steps: number of synthetic inputs, and of steps to optimize them.
    """

    source: Source = "analytic"
    ridge: float = 1e-3
    max_gain: float = 3.0
    length: float = 1.0
    images: int = 128
    steps: int = 60

    def __post_init__(self) -> None:
        real, whole = (Real, 0, "finite and not negative"), (Integral, 1, "a whole number from 1")
        kinds = dict.fromkeys(("ridge", "max_gain", "length"), real)
        for setting, (kind, least, rule) in {**kinds, "images": whole, "steps": whole}.items():
            value = getattr(self, setting)
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not number or not least <= value < float("inf"):
                raise IntrafuseError(f"{setting} must be {rule}", value=value, usage=True)

    def readings(
        self, group: ChannelGroup, weights: Weights, context: Context, *, places: bool = False,
        without: Container[str] = (),
    ) -> dict[str, Reading]:  # fmt: skip
        """Return the moments of a group's channels as each reader sees them, by its weight's name.

        With `places` each place of a channel on the reader's axis is treated as a separate channel.
        Measured moments leave the readers in `without` out.
        """
        if self.source == "analytic":
            return readings(group, self._propagation(weights, context), places=places)
        merged, pending = context.weights, context.pending
        return self._measured(context).readings(
            group, weights, length=self.length, places=places, merged=merged, pending=pending,
            without=without,
        )  # fmt: skip

    def solved(self, maps: Sequence[MergeMap], context: Context) -> dict[str, Tensor]:
        """Solve the layers on data, after all groups are merged (`intrafuse.moments.solve`)."""
        if self.source == "analytic" or not maps:
            return {}
        return self._measured(context).solved(
            context.original, context.weights, maps, self.max_gain
        )

    def solves_later(self, context: Context) -> frozenset[str]:
        """Return the weights of the layers that `solved` will solve."""
        if self.source == "analytic":
            return frozenset()
        if SOLVABLE not in context.cache:
            layers = solvable(context.weights.graph).values()
            context.cache[SOLVABLE] = frozenset(layer.weight for layer in layers)
        return context.cache[SOLVABLE]

    def outputs(self, names: Sequence[str], weights: Weights, context: Context) -> list[Written]:
        """Return mean and covariance of the outputs of linear maps; None where unknown."""
        if self.source == "analytic":
            return written(names, self._propagation(weights, context))
        return self._measured(context).written(names, weights, pending=context.pending)

    def _propagation(self, weights: Weights, context: Context) -> Propagation:
        """Return the analytic moments of tensors that differ little from those of the last call."""
        key, merged, pending = f"moments of length {self.length}", context.weights, context.pending
        known = context.cache.get(key) or Propagation(merged, pending, length=self.length)
        context.cache[key] = known = known.until(merged, pending)
        return known if weights is merged else known.trying(weights)

    def _measured(self, context: Context) -> Calibration:
        if self.source not in context.cache:
            data = context.data
            if self.source == "synthetic":
                data = synthesise(
                    context.model,
                    context.example_inputs,
                    images=self.images,
                    steps=self.steps,
                    seed=context.seed,
                    progress=context.progress,
                )
            context.cache[self.source] = Calibration(context.model, data)
        return context.cache[self.source]

    def readings_beside(
        self, group: ChannelGroup, maps: Sequence[MergeMap], context: Context,
        without: Container[str] = (),
    ) -> list[dict[str, Reading]]:  # fmt: skip
        """Return readings of a group's old and new channels, for each of several maps."""
        if without and all(slot.parameter in without for slot in group.readers):
            self._measured(context)  # data is read, or made, before the first group is merged
            return [{} for _ in maps]
        n = context.weights.sizes[group.id]
        both = context.weights.snapshot()
        both.merge(beside(group.name, n, maps))
        known = self.readings(group, both, context, without=without)
        slots = {slot.parameter: slot for slot in group.readers}
        for name, reading in known.items():
            taps, _, _ = reader_taps(group, slots[name], context.weights, self.length)
            known[name] = replace(reading, taps=taps)
            if len(reading.rest) != len(taps):  # a reader that also writes was widened
                nothing = torch.zeros(len(taps)).double()
                known[name] = replace(known[name], rest=nothing, rest_mean=nothing)
        parts, at = [], n
        for merge_map in maps:
            new = slice(at, at + merge_map.width)
            parts.append({name: r.narrowed(slice(0, n), new) for name, r in known.items()})
            at += merge_map.width
        return parts
