"""Measure moments of activations on unlabeled data, of the original and the pruned network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGroup, Slot
from intrafuse.graph.trace import as_arguments, evaluating
from intrafuse.moments.readers import Reading, Written, place_taps, reader_taps
from intrafuse.support.batches import batches, fitting
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums
from intrafuse.surgery.install import install
from intrafuse.surgery.watch import FIT, watching
from intrafuse.surgery.weights import Weights

__all__ = ["LAYERS", "Calibration"]

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
BATCHES = 64  # most batches of the data to use
SAMPLES = 16_384  # most positions of each layer's input to keep, over all batches
PAIRS = (0, 0), (1, 1), (0, 1)  # covariances to sum: 0 is the old activation, 1 the new one
Captured = dict[str, list[Tensor]]  # by layer, for each call: (samples, channels), float32


class Calibration:
    """Moments of layer inputs, measured on the user's data.

    The data is read once, up to 64 batches. To bound memory, each batch contributes positions
    drawn at random, the same in every network.

    Args:
        model: the original network.
        data: batches of inputs, or of (inputs, labels); labels are ignored.

    Raises:
        IntrafuseError: there is no data, or it does not consist of batches.
    """

    def __init__(self, model: nn.Module, data: Iterable | None) -> None:
        self.model = model
        self.inputs = [x for x, _ in batches(data, model, purpose="calibration", limit=BATCHES)]
        self._known: list[Captured] | None = None

    def readings(
        self, group: ChannelGroup, weights: Weights, *, length: float = 1.0, places: bool = False
    ) -> dict[str, Reading]:
        """Measure the inputs of each reader of a group, in the original and as pruned so far.

        Args:
            group: the channel group.
            weights: the tensors as merged so far; the group may be widened, with merged channels
                behind the old ones.
            length: correlation length between taps, in positions, for the variance of outputs.
            places: see `intrafuse.moments.readers.readings`. Places are many and samples may be
                few, so off-diagonal covariance is multiplied by n / (n + 2 p) for n samples of p
                places.

        Returns:
            Readings by the name of the reader's weight: `old` of the original network (n channels),
            `new` of the pruned one. Readers that are not modules of torch.nn are left out.

        Raises:
            IntrafuseError: an activation is not finite.
        """
        slots = [s for s in weights.present(group.readers) if _is_plain(self.model, s)]
        if places:
            slots = [s for s in slots if place_taps(group, s, weights) is not None]
        known = self._original(weights)
        current = install(self.model, weights)
        calls = {s.layer: len(known[0].get(s.layer, ())) for s in slots}
        sums = {slot: Sums(*PAIRS) for slot in slots if calls[slot.layer]}
        new = self._capture(current, [slot.layer for slot in sums], calls) if sums else ()
        for before, after in zip(known, new, strict=bool(sums)):
            for slot, total in sums.items():
                was = _rows(group, slot, weights, weights.graph.sizes, places)
                now = _rows(group, slot, weights, weights.sizes, places)
                if places and len(was) != len(now):  # the reader was already re-solved
                    before, was = after, now
                for x, y in zip(before[slot.layer], after[slot.layer], strict=True):
                    total.add(_part(x, was), _part(y, now))
        measured = {}
        for slot, total in sums.items():
            taps, kernel, _ = reader_taps(group, slot, weights, length)
            if places:
                taps = place_taps(group, slot, weights)
                assert taps is not None
                kernel = torch.ones(1, 1).double()
            reading = _reading(total, slot.layer, taps, kernel, calls[slot.layer])
            measured[slot.parameter] = _shrunk(reading, total.count) if places else reading
        return measured

    def written(self, names: Sequence[str], weights: Weights) -> list[Written]:
        """Compute mean and covariance of linear maps' outputs on the original network's inputs.

        Uses the weights as merged so far; None for a map that reads other channels than originally.
        """
        found: list[Written] = []
        for name in names:
            layer, weight = weights.graph.layers[name], weights.state[name].cpu().double()
            total = Sums(*PAIRS)
            for batch in self._original(weights):
                for x in batch.get(layer.name, ()):
                    total.add(x.cpu(), x.cpu()[:, :0])
            if not total.count or weight.dim() != 2:
                found.append(None)
                continue
            matrix = weight.movedim(layer.output_axis, 0)
            taps = matrix[:, :, None]
            read = _reading(total, layer.name, taps, torch.ones(1, 1).double(), 1)
            if len(read.old) != matrix.shape[1]:
                found.append(None)
                continue
            bias = weights.state.get(layer.bias or "")
            mean = matrix @ read.old_mean + (0 if bias is None else bias.cpu().double())
            found.append((mean, matrix @ read.old @ matrix.T))
        return found

    def _original(self, weights: Weights) -> list[Captured]:
        if self._known is None:
            layers = sorted(layer.name for layer in weights.graph.layers.values())
            plain = [name for name in layers if _plain(self.model, name)]
            self._known = list(self._capture(self.model, plain))
        return self._known

    def _capture(
        self, model: nn.Module, layers: list[str], calls: Mapping[str, int] | None = None
    ) -> Iterator[Captured]:
        """Run a network on every batch and keep samples of the inputs of some layers.

        If the number of calls of each layer is given, a run ends at the last call.
        """
        each = SAMPLES // len(self.inputs)
        with evaluating(model), torch.no_grad():
            for seen, inputs in enumerate(self.inputs):
                found: Captured = {}
                left = None if calls is None else sum(calls[layer] for layer in layers)
                args, kwargs = as_arguments(inputs)
                what = f"batch {seen + 1} of the data"
                with fitting(what, FIT), _watching(model, layers, found, each, left):
                    model(*args, **kwargs)
                yield found


def _reading(total: Sums, layer: str, taps: Tensor, kernel: Tensor, calls: int) -> Reading:
    """Make a reading from the sums over old and new activations."""
    if not total.count:
        raise IntrafuseError("the data holds no sample", layer=layer)
    of_old, of_new, cross = (total.covariance(*pair) for pair in PAIRS)
    if not (torch.isfinite(of_old).all() and torch.isfinite(of_new).all()):
        raise IntrafuseError("activations must be finite on the data", layer=layer)
    zero = torch.zeros(len(taps)).double()
    old, new = total.mean(0), total.mean(1)
    return Reading(layer, taps, kernel, old, of_old, new, of_new, cross, zero, zero, calls)


def _plain(model: nn.Module, layer: str) -> bool:
    return isinstance(model.get_submodule(layer), LAYERS)


def _is_plain(model: nn.Module, slot: Slot) -> bool:
    return slot.parameter.endswith(".weight") and _plain(model, slot.layer)


def _rows(
    group: ChannelGroup, slot: Slot, weights: Weights, sizes: Mapping[int, int], places: bool
) -> Tensor:
    """Return the positions (channels, repeats) of a group on a reader's input axis."""
    blocks = weights.graph.blocks(slot, group.id, sizes)
    rows = torch.from_numpy(positions(blocks, sizes[group.id]))
    return rows.flatten().sort().values[:, None] if places else rows


def _shrunk(reading: Reading, samples: int) -> Reading:
    """Shrink off-diagonal covariance when samples are few; keep variances."""
    factor = samples / (samples + 2 * len(reading.old_mean))

    def shrink(matrix: Tensor) -> Tensor:
        return factor * matrix + (1 - factor) * matrix.diagonal().diag()

    old, new, cross = (shrink(part) for part in (reading.old, reading.new, reading.cross))
    return replace(reading, old=old, new=new, cross=cross)


def _part(x: Tensor, rows: Tensor) -> Tensor:
    """Take channels at positions (channels, repeats) from x (samples, all positions).

    Returns:
        (samples x repeats, channels).
    """
    return x[:, rows.T.to(x.device)].flatten(0, 1).cpu()


class _Enough(Exception):
    """All expected calls have been captured."""


@contextmanager
def _watching(
    model: nn.Module, layers: list[str], found: Captured, each: int, left: int | None
) -> Iterator[None]:
    """Collect at most `each` samples of the input of each call of some layers in `found`."""

    def keep(layer: str, axis: int, x: Tensor) -> None:
        nonlocal left
        lines = x.movedim(axis, -1).reshape(-1, x.shape[axis])
        if len(lines) > each:
            generator = torch.Generator().manual_seed(len(lines))
            chosen = torch.randperm(len(lines), generator=generator)[:each].sort().values
            lines = lines[chosen.to(lines.device)]
        found.setdefault(layer, []).append(lines.float())
        left = None if left is None else left - 1
        if left == 0:
            raise _Enough

    def watched() -> Iterator[tuple[nn.Module, Callable[[Tensor], None]]]:
        for layer in layers:
            module = model.get_submodule(layer)
            axis = -1 - len(getattr(module, "kernel_size", ()))  # inputs may lack a batch axis
            yield module, partial(keep, layer, axis)

    try:
        with watching(watched(), inputs=True):
            yield
    except _Enough:
        pass
