"""Measure moments of activations on unlabeled data, of the original and the pruned network."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGraph, ChannelGroup, Slot
from intrafuse.moments.readers import Reading, Written, place_taps, reader_taps
from intrafuse.moments.solve import SAMPLES, solve_layers
from intrafuse.support.batches import batches
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.sums import Sums
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations, Batches
from intrafuse.sweep.patches import drawn_lines

__all__ = ["Calibration"]

BATCHES = 64  # most batches of the data to use
PAIRS = (0, 0), (1, 1), (0, 1)  # covariances to sum: 0 is the old activation, 1 the new one


class Calibration:
    """Moments of layer inputs, measured on the user's data.

    The data is read once, up to 64 batches. The original network and the network as merged so far
    are run side by side, operator by operator (`intrafuse.sweep`). To bound the time of
    covariances, each batch contributes positions drawn at random, the same in both networks.

    Args:
        model: the original network.
        data: batches of inputs, or of (inputs, labels); labels are ignored.

    Raises:
        IntrafuseError: there is no data, or it does not consist of batches.
    """

    def __init__(self, model: nn.Module, data: Iterable | None) -> None:
        self.model = model
        self.inputs = [x for x, _ in batches(data, model, purpose="calibration", limit=BATCHES)]
        self._batches: Batches | None = None
        self._networks: tuple[Activations, Activations] | None = None

    def readings(
        self,
        group: ChannelGroup,
        weights: Weights,
        *,
        length: float = 1.0,
        places: bool = False,
        merged: Weights | None = None,
        pending: frozenset[str] | None = None,
        without: Container[str] = (),
    ) -> dict[str, Reading]:
        """Measure the inputs of each reader of a group, in the original and as pruned so far.

        Args:
            group: the channel group.
            weights: the tensors to measure; the group may be widened, with merged channels behind
                the old ones.
            length: correlation length between taps, in positions, for the variance of outputs.
            places: see `intrafuse.moments.readers.readings`. Places are many and samples may be
                few, so off-diagonal covariance is multiplied by n / (n + 2 p) for n samples of p
                places.
            merged: the tensors as merged so far, if `weights` are only tried.
            without: the weights of readers to leave out.

        Returns:
            Readings by the name of the reader's weight: `old` of the original network (n channels),
            `new` of the pruned one. Readers that no convolution or linear map reads are left out.

        Raises:
            IntrafuseError: an activation is not finite, or the model refuses a batch.
        """
        was, now = self._run(weights if merged is None else merged, pending)
        if merged is not None and weights is not merged:
            now = now.trying(weights)
        measured = {}
        for slot in weights.present(group.readers):
            nodes = [] if slot.parameter in without else now.calls.get(slot.parameter, [])
            own = place_taps(group, slot, weights) if places else None
            if slot.parameter not in weights.graph.layers or not nodes or (places and own is None):
                continue
            total = self._compared(group, slot, (was, now), nodes, places)
            if total is None:
                continue
            taps, kernel, _ = reader_taps(group, slot, weights, length)
            if own is not None:
                taps, kernel = own, torch.ones(1, 1).double()
            reading = _reading(total, slot.layer, taps, kernel, len(nodes))
            measured[slot.parameter] = _shrunk(reading, total.count) if places else reading
        return measured

    def _compared(
        self,
        group: ChannelGroup,
        slot: Slot,
        networks: tuple[Activations, Activations],
        nodes: Sequence[Node],
        places: bool,
    ) -> Sums | None:
        """Sum over the channels that a reader receives in the original, and now."""
        weights, total = networks[1].weights, Sums(*PAIRS)
        was = _rows(group, slot, weights, weights.graph.sizes, places)
        now = _rows(group, slot, weights, weights.sizes, places)
        axis = 1 - weights.state[slot.parameter].dim()
        for node in nodes:
            before, after = (network.of(node.all_input_nodes[0]) for network in networks)
            if before is None or after is None:
                return None
            if places and len(was) != len(now):  # the reader was already re-solved
                before, was = after, now
            for x, y in zip(before, after, strict=True):
                old, new = (drawn_lines(value, axis, self._each) for value in (x, y))
                total.add(_part(old, was), _part(new, now))
        return total

    def written(
        self, names: Sequence[str], weights: Weights, *, pending: frozenset[str] | None = None
    ) -> list[Written]:
        """Compute mean and covariance of linear maps' outputs on the original network's inputs.

        Uses the weights as merged so far; None for a map that reads other channels than originally.
        """
        was, _ = self._run(weights, pending)
        found: list[Written] = []
        for name in names:
            layer, weight = weights.graph.layers[name], weights.state[name].cpu().double()
            inputs = [was.of(node.all_input_nodes[0]) for node in was.calls.get(name, [])]
            total = Sums(*PAIRS)
            for x in (x for values in inputs for x in values or ()):
                lines = drawn_lines(x, -1, self._each).cpu()
                total.add(lines, lines[:, :0])
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

    def _run(
        self, merged: Weights, pending: frozenset[str] | None
    ) -> tuple[Activations, Activations]:
        """Return the results of operators in the original network and in the merged one."""
        graph = merged.graph
        pending = frozenset(graph.by_name) if pending is None else pending
        if self._networks is None:
            data = self._read(graph)
            original = Activations(Weights.of(graph, self.model), data, pending, fixed=True)
            self._networks = original, Activations(merged, data, pending)
        was, now = self._networks
        self._networks = was.until(was.weights, pending), now.until(merged, pending)
        return self._networks

    def solved(
        self, original: Weights, merged: Weights, maps: Sequence[MergeMap], max_gain: float
    ) -> dict[str, Tensor]:
        """Solve the layers of a merged network for the outputs of the original one.

        Args:
            original: the tensors before any merge, with batch norm folded as in the merged ones.
            merged: the tensors after all maps.
            maps, max_gain: see `intrafuse.moments.solve.solve_layers`.
        """
        data = self._read(merged.graph)
        before = Activations(original, data, fixed=True)
        return solve_layers(before, Activations(merged, data), maps, max_gain=max_gain)

    def _read(self, graph: ChannelGraph) -> Batches:
        self._batches = self._batches or Batches(self.model, graph, self.inputs)
        return self._batches

    @property
    def _each(self) -> int:
        """Most positions to draw in each batch."""
        return SAMPLES // len(self.inputs)


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
