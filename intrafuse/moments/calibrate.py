"""Moments of activations measured on unlabelled data: the original network against the pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from intrafuse.errors import IntrafuseError
from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.graph.trace import evaluating
from intrafuse.moments.readers import Reading, reader_taps
from intrafuse.surgery import install
from intrafuse.weights import Weights

__all__ = ["measured_readings"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def measured_readings(
    group: ChannelGroup,
    model: nn.Module,
    weights: Weights,
    data: Iterable,
    *,
    length: float = 1.0,
) -> dict[str, Reading]:
    """Measure what each reader of a group reads, in the original network and as pruned so far.

    Args:
        group: the channel group.
        model: the original network.
        weights: the tensors as merged so far; the group may have been widened in them, so that
            merged channels stand behind the old ones.
        data: batches of inputs, or of (inputs, labels); labels are ignored.
        length: of the correlation between taps, for the variance of outputs.

    Returns:
        Readings by the name of the reader's weight. `old` is of the original network (n channels),
        `new` of the other. Readers that are no modules of torch.nn are left out.

    Raises:
        IntrafuseError: no data, or an activation is not finite.
    """
    current = install(model, weights)
    slots = [s for s in weights.present(group.readers) if _module(model, s) is not None]
    sums: dict[str, _Sums] = {slot.parameter: _Sums() for slot in slots}
    seen = False
    with evaluating(model), evaluating(current), torch.no_grad():
        for batch in data:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            sizes = weights.graph.sizes
            old = _capture(model, inputs, {s: _rows(group, s, weights, sizes) for s in slots})
            new = _capture(
                current, inputs, {s: _rows(group, s, weights, weights.sizes) for s in slots}
            )
            for slot in slots:
                if slot.parameter in old:
                    sums[slot.parameter].add(old[slot.parameter], new[slot.parameter])
            seen = True
    if not seen:
        raise IntrafuseError(
            "calibration needs at least one batch of data",
            remedy="give data= as a list of batches or a loader (--data on the command line)",
        )
    found = {}
    for slot in slots:
        if sums[slot.parameter].count:
            taps, kernel, _ = reader_taps(group, slot, weights, length)
            found[slot.parameter] = sums[slot.parameter].reading(slot.layer, taps, kernel)
    return found


class _Sums:
    """Streaming second moments of old and new activations, in float64."""

    def __init__(self) -> None:
        self.count = self.calls = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def add(self, old: list[Tensor], new: list[Tensor]) -> None:
        self.calls = len(old)
        for x, y in zip(old, new, strict=True):
            self.count += x.shape[1]
            first = [x.sum(1).double(), y.sum(1).double()]
            second = [(x @ x.T).double(), (y @ y.T).double(), (x @ y.T).double()]
            if not self.first:
                self.first, self.second = first, second
            else:
                self.first = [a + b for a, b in zip(self.first, first, strict=True)]
                self.second = [a + b for a, b in zip(self.second, second, strict=True)]

    def reading(self, layer: str, taps: Tensor, kernel: Tensor) -> Reading:
        old, new = (total / self.count for total in self.first)
        pairs = ((old, old), (new, new), (old, new))
        of_old, of_new, cross = (
            total / self.count - torch.outer(a, b)
            for total, (a, b) in zip(self.second, pairs, strict=True)
        )
        if not (torch.isfinite(of_old).all() and torch.isfinite(of_new).all()):
            raise IntrafuseError("activations must be finite on the data", layer=layer)
        zero = torch.zeros(len(taps)).double()
        return Reading(layer, taps, kernel, old, of_old, new, of_new, cross, zero, zero, self.calls)


def _module(model: nn.Module, slot: Slot) -> nn.Module | None:
    module = model.get_submodule(slot.layer)
    plain = isinstance(module, LAYERS) and slot.parameter.endswith(".weight")
    return module if plain else None


def _rows(group: ChannelGroup, slot: Slot, weights: Weights, sizes) -> Tensor:
    blocks = weights.graph.blocks(slot, group.id, sizes)
    return torch.from_numpy(positions(blocks, sizes[group.id]))


def _capture(model: nn.Module, inputs: object, rows: dict[Slot, Tensor]) -> dict[str, list[Tensor]]:
    """Run a network and keep what enters some readers: (channels, samples), float32, by call."""
    found: dict[str, list[Tensor]] = {}

    def keep(slot: Slot, where: Tensor) -> Callable:
        def hook(module: nn.Module, received: tuple) -> None:
            x = received[0]
            axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            front = x.movedim(axis, 0)[where.flatten()].float()
            lines = front.reshape(len(where), -1)
            found.setdefault(slot.parameter, []).append(lines)

        return hook

    with _hooks(model, {slot: keep(slot, where) for slot, where in rows.items()}):
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found


@contextmanager
def _hooks(model: nn.Module, hooks: dict[Slot, Callable]) -> Iterator[None]:
    handles = []
    try:
        for slot, hook in hooks.items():
            module = model.get_submodule(slot.layer)
            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
