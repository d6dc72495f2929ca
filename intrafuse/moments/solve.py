"""Solve each layer for the original's outputs, from what the pruned network really feeds it.

Letters, for a layer, or for one group of a grouped convolution:

    h, h'  (n,), (m,)  channels that it reads in the original and in the pruned network
    x      (d,)        patch of h' that its kernel covers, m channels times taps
    y      (outputs,)  wanted outputs: those of the original, merged as the plan merges them
    V      (outputs, n, taps)  the original weight, its outputs merged likewise

    W0 = V Q,  Q = Cov(h, h') (Cov(h', h') + ridge)^-1       reads the old channels from the new
    W  = W0 + (Cov(y, x) - W0 Cov(x, x)) (Cov(x, x) + ridge)^-1      corrects the whole kernel

Ridges are in units of the mean variance. A quarter of the samples is held out to choose among
them, and between W0 and the weight that the plan has merged; then all samples solve. So a kernel
with more entries than there are samples keeps what the channels tell. Errors of earlier layers are
corrected where they arise instead of adding up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from intrafuse.graph.groups import ChannelGraph, Layer
from intrafuse.graph.rules import arguments
from intrafuse.moments.regression import Fits, Regression
from intrafuse.moments.taps import as_taps
from intrafuse.support.sums import Sums
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.merged import merged_output
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations, Batches
from intrafuse.sweep.following import weight_read
from intrafuse.sweep.patches import drawn, drawn_lines, is_plain, lines, patches, without

__all__ = ["SAMPLES", "solvable", "solve_layers"]

PAIRS = (1, 1), (0, 1)  # covariances to sum: 0 is what is wanted, 1 what is read
SAMPLES = 16_384  # most positions of each layer to draw, over all batches
NUMBERS = 2**27  # most numbers to draw of a layer's outputs: fewer positions of wide layers
READING = (1e-3, 1e-2, 1e-1)  # ridges of Q
KERNELS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # ridges of W, from the strongest
HELD = 4  # one sample in so many is held out


def solvable(graph: ChannelGraph) -> dict[Node, Layer]:
    """Return the layers that can be solved, in order of execution.

    Each weight is used once. Transposed convolutions must not be grouped.
    """
    program = graph.program
    uses = Counter(
        program.parameters.get(source)
        for node in program.nodes
        if node.op == "call_function"
        for source in node.all_input_nodes
    )
    found: dict[Node, Layer] = {}
    for node in program.nodes:
        layer = graph.layers.get(weight_read(program, node))
        if layer is None or uses[layer.weight] != 1:
            continue
        plain = is_plain(node)
        straight = (layer.output_axis, layer.input_axis) == ((0, 1) if plain else (1, 0))
        if straight and (plain or arguments(node)["groups"] == 1):
            found[node] = layer
    return found


def solve_layers(
    original: Activations, pruned: Activations, maps: Sequence[MergeMap], *, max_gain: float = 3.0
) -> dict[str, Tensor]:
    """Solve every layer whose inputs pruning has changed, from input to output.

    Args:
        original: the network before pruning, with batch norm folded as in the pruned one.
        pruned: the network after all maps, on the same data.
        maps: the maps, in the order of application.
        max_gain: largest gain that restores the deviation of an output, which a regression
            shrinks; 0 gives gains of one.

    Returns:
        New weights and biases by name.

    Raises:
        IntrafuseError: an activation is not finite.
    """
    weights = pruned.weights.snapshot()
    solved: dict[str, Tensor] = {}
    for node, layer in solvable(weights.graph).items():
        pruned = pruned.at(weights)
        old = original.of(node.all_input_nodes[0])  # before the next line frees it
        wanted, new = original.of(node), pruned.of(node.all_input_nodes[0])
        if old is None or wanted is None or new is None or _equal(old, new):
            continue
        task = _Task(layer, original.weights, weights, maps)
        samples = _Samples(task, pruned.batches, node)
        for number, batch in enumerate(zip(old, wanted, new, strict=True)):
            if batch[1].numel():
                samples.add(number, *batch)
        if is_plain(node):
            found = _solved(task, samples, max_gain)
        else:
            weights.put(_read_back(task, samples))
            got = pruned.at(weights).of(node)
            pairs = [(y, z) for y, z in zip(wanted, got, strict=True) if y.numel()] if got else []
            found = _matched(task, pairs, max_gain)
        weights.put(found)
        solved |= found
    return solved


def _equal(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    pairs = zip(old, new, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class _Task:
    """A layer of the original network and of the one that the maps have merged."""

    layer: Layer
    original: Weights
    pruned: Weights
    maps: Sequence[MergeMap]

    @property
    def weight(self) -> Tensor:
        """The merged weight (outputs, channels of a group, kernel...)."""
        return self.pruned.state[self.layer.weight]

    def merged(self, outputs: Tensor, axis: int) -> Tensor:
        """Merge outputs of the original along an axis as the plan merges those of the layer."""
        graph, name = self.original.graph, self.layer.weight
        tree = graph.axes[name][self.layer.output_axis]
        return merged_output(graph, self.maps, tree, name, outputs, axis)

    def rows(self) -> Tensor:
        """Return V (outputs, n, taps), float64."""
        weight = self.original.state[self.layer.weight].cpu().double()
        axes = self.layer.output_axis, self.layer.input_axis
        shift = self.merged(torch.zeros_like(weight), axes[0])
        return as_taps(self.merged(weight, axes[0]) - shift, *axes)


class _Samples:
    """Moments of what a layer reads and writes, of the samples to solve with and those held out.

    Attributes:
        groups: of the convolution.
        patches: (solving, held out) sums of wanted outputs and patches, by group; none for a
            transposed convolution.
        channels: (solving, held out) sums of old and new channels; none for several groups.
    """

    def __init__(self, task: _Task, batches: Batches, node: Node) -> None:
        self.task, self.node, self.batches = task, node, batches
        self.patches, self.channels = ((Sums(*PAIRS), Sums(*PAIRS)) for _ in "ab")
        self.groups = 1
        self._seen = 0

    def add(self, batch: int, old: Tensor, wanted: Tensor, new: Tensor) -> None:
        """Add old inputs, the original's outputs and new inputs of a batch, given its number."""
        weight = self.task.weight
        axis = 1 - weight.dim()
        most = max(1, min(SAMPLES, NUMBERS // wanted.shape[axis]) // len(self.batches))
        if is_plain(self.node):
            at = drawn(without(wanted.shape, axis), most)
            twin = self.batches.twins[batch][self.node]
            x = patches(twin, new, weight.shape[2:], at)
            self.groups = x.shape[1] // weight.shape[1]
            y = self.task.merged(lines(wanted, axis, at), 1)
            by_group = (part.flatten(1).unflatten(1, (self.groups, -1)) for part in (y, x))
            self._split(self.patches, *(part.movedim(1, 0) for part in by_group))
        if self.groups == 1:
            channels = (drawn_lines(part, axis, most)[None] for part in (old, new))
            self._split(self.channels, *channels)
        self._seen += 1

    def _split(self, sums: tuple[Sums, Sums], *parts: Tensor) -> None:
        """Hold out the last samples of a batch; if it has too few, all of some batches."""
        count = parts[0].shape[1]
        few = 0 if self._seen % HELD == HELD - 1 else count
        cut = count - count // HELD if count >= HELD else few
        sums[0].add(*(part[:, :cut] for part in parts))
        sums[1].add(*(part[:, cut:] for part in parts))


def _solved(task: _Task, samples: _Samples, max_gain: float) -> dict[str, Tensor]:
    """Solve a layer for its wanted outputs; return its weight and bias by name."""
    layer, weight = task.layer, task.weight
    fits = Fits.of(samples.patches, layer)
    whole = fits.whole
    best = weight.cpu().double().reshape(samples.groups, -1, whole.xx.shape[-1])
    if fits.held is not None:
        channels = Fits.of(samples.channels, layer) if samples.groups == 1 else None
        best = _corrected(fits, fits.held, *_started(best, task, channels, fits.held))
    best = best * _gain(whole.yy, ((best @ whole.xx) * best).sum(-1), max_gain)[..., None]
    found = {layer.weight: best.reshape(weight.shape).to(weight)}
    if layer.bias is not None:
        found[layer.bias] = (whole.y - (best @ whole.x[..., None])[..., 0]).flatten().to(weight)
    return found


def _started(
    merged: Tensor, task: _Task, channels: Fits | None, held: Regression
) -> tuple[Tensor, Tensor]:
    """Choose W0 by the samples held out; return it as the others and as all samples tell it."""
    if channels is None:
        return merged.float(), merged
    rows = task.rows()
    single = rows.float()
    starts = {0.0: merged.float()}
    starts |= {ridge: _decoded(single, channels.solving, ridge) for ridge in READING}
    best = min(starts, key=lambda ridge: held.error(starts[ridge]))
    return starts[best], _decoded(rows, channels.whole, best) if best else merged


def _decoded(rows: Tensor, channels: Regression, ridge: float) -> Tensor:
    """Return W0 = V Q, (1, outputs, d)."""
    reading = channels.step(channels.yx, ridge)[0].to(rows)
    return torch.einsum("oit,ij->ojt", rows, reading).reshape(1, len(rows), -1)


def _corrected(fits: Fits, held: Regression, start: Tensor, whole: Tensor) -> Tensor:
    """Correct the whole kernel, by the ridge with the smallest error of the samples held out."""
    least, best, left = held.error(start), 0.0, fits.solving.left(start)
    for ridge in KERNELS:
        error = held.error(start + fits.solving.step(left, ridge))
        if not error < least:
            break
        least, best = error, ridge
    return whole + fits.whole.step(fits.whole.left(whole), best) if best else whole


def _gain(wanted: Tensor, got: Tensor, most: float) -> Tensor:
    """Return the gain that restores the variance of outputs; one if `most` is zero."""
    gain = (wanted / got.clamp_min(1e-300)).sqrt().clamp_max(most)
    return torch.where((got > 1e-12 * wanted) & (gain > 0), gain, 1.0)


def _read_back(task: _Task, samples: _Samples) -> dict[str, Tensor]:
    """Let a transposed convolution read the old channels from the new ones."""
    channels = Fits.of(samples.channels, task.layer)
    ridge = READING[0]
    if channels.held is not None:
        held, solving = channels.held, channels.solving
        ridge = min(READING, key=lambda r: held.error(solving.step(solving.yx, r)))
    decoded = _decoded(task.rows(), channels.whole, ridge)[0]
    weight = task.weight
    ordered = decoded.reshape(weight.shape[1], len(weight), *weight.shape[2:]).transpose(0, 1)
    return {task.layer.weight: ordered.to(weight).contiguous()}


def _matched(
    task: _Task, outputs: Sequence[tuple[Tensor, Tensor]], max_gain: float
) -> dict[str, Tensor]:
    """Match mean and deviation of measured outputs to the wanted ones."""
    layer, axis, sums = task.layer, 1 - task.weight.dim(), Sums()
    for wanted, got in outputs:
        ours = got.movedim(axis, -1).flatten(0, -2).float()
        theirs = task.merged(wanted.float(), axis).movedim(axis, -1).flatten(0, -2).to(ours)
        sums.add(theirs, ours)
    changed = task.pruned.snapshot()
    if sums.count:
        gain = _gain(sums.variance(0), sums.variance(1), max_gain)
        shift = sums.mean(0) - gain * sums.mean(1)
        changed.rescale(layer.weight, gain, None if layer.bias is None else shift)
    return {name: changed.state[name] for name in layer.tensors if name in changed.state}
