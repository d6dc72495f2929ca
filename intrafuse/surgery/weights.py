"""The tensors of a network on their way through a plan, without the module that owns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from intrafuse.graph.axes import Block, leaves, tree_size
from intrafuse.graph.blocks import channel_rows, merge_channels, put_channels, select_channels
from intrafuse.graph.groups import ChannelGraph, ChannelGroup, Slot
from intrafuse.support.device import require_numbers
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["Weights"]


class Weights:
    """A state dict together with the graph that says what its axes mean.

    Planning and surgery both work on this: tensors are replaced, never written into, so the
    model that they came from stays as it is.

    Attributes:
        graph: the channel graph of the traced network.
        state: parameters and buffers by name; shared parameters under one name.
        sizes: the current size of every atom; a merged group has its new width.
        statistics: mean and standard deviation (outputs,) of a layer's output, by the name of its
            weight, where a batch norm that was folded into the layer told them.
    """

    def __init__(
        self, graph: ChannelGraph, state: Mapping[str, Tensor], buffers: Iterable[str] = ()
    ) -> None:
        self.graph = graph
        self.buffers = frozenset(buffers)
        self.state = {k: v.detach() for k, v in state.items() if k not in graph.aliases}
        self.sizes = dict(graph.sizes)
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, graph: ChannelGraph, model: nn.Module) -> Weights:
        """Take the tensors of a model, without copying them.

        Raises:
            IntrafuseError: a tensor of the graph is absent, of another shape, or not finite.
        """
        buffers = dict(model.named_buffers())
        weights = cls(graph, {**dict(model.named_parameters()), **buffers}, buffers)
        optional = {layer.bias for layer in graph.layers.values()}
        missing = sorted(n for n in graph.axes if n not in weights.state and n not in optional)
        if missing:
            raise IntrafuseError(
                "the model lacks parameters of the model that the plan was made for",
                value=missing,
                remedy="make the plan from this model",
            )
        slots = {slot.parameter for group in graph.groups for slot in group.slots}
        for name in graph.axes:
            if name not in weights.state:
                continue
            tensor = weights.state[name]
            if tuple(tensor.shape) != graph.shape(name, graph.sizes):
                raise IntrafuseError(
                    "the model must have the shapes that the plan was made for",
                    value=tuple(tensor.shape),
                    layer=name,
                    remedy="make the plan from this model",
                )
            require_numbers(name, tensor)
            if name in slots and tensor.is_floating_point() and tensor.itemsize < 2:
                raise IntrafuseError(
                    "weights must have 16 bits or more",
                    value=str(tensor.dtype),
                    layer=name,
                    remedy="prune model.to(torch.bfloat16), and quantize what comes out",
                )
            mask = name in buffers and name not in slots  # attention masks hold -inf
            if tensor.is_floating_point() and not _finite(tensor, mask):
                raise IntrafuseError(
                    "weights must be finite, but NaN or infinity was found",
                    layer=name,
                    remedy="repair or reload the weights",
                )
        return weights

    def rows(self, group: ChannelGroup, slot: Slot) -> Tensor:
        """Return the channels of a group in one slot as rows (channels, elements)."""
        blocks = self.graph.blocks(slot, group.id, self.sizes)
        return channel_rows(self.state[slot.parameter], slot.axis, blocks, self.sizes[group.id])

    def present(self, slots: tuple[Slot, ...]) -> list[Slot]:
        """Drop slots of biases that layers could have but do not."""
        return [slot for slot in slots if slot.parameter in self.state]

    def snapshot(self) -> Weights:
        """Return the same tensors under a name of their own: later merges do not reach it."""
        copy = Weights(self.graph, self.state, self.buffers)
        copy.sizes, copy.statistics = dict(self.sizes), dict(self.statistics)
        return copy

    def on_cpu(self) -> Weights:
        """Return the same tensors in the CPU's memory; where they lie there already, itself."""
        if all(tensor.device.type == "cpu" for tensor in self.state.values()):
            return self
        copy = self.snapshot()
        copy.state = {name: tensor.cpu() for name, tensor in copy.state.items()}
        copy.statistics = {k: (mean.cpu(), std.cpu()) for k, (mean, std) in copy.statistics.items()}
        return copy

    def counted(self) -> dict[str, int]:
        """Count the elements of every parameter, by name; buffers do not count."""
        return {name: t.numel() for name, t in self.state.items() if name not in self.buffers}

    def merge(self, step: MergeMap) -> None:
        """Apply one merge map."""
        group = self.graph.by_name[step.group]
        n = self.sizes[group.id]
        before = dict(self.state)
        for slot in self.present(group.slots):
            tensor = self.state[slot.parameter]
            blocks = self.graph.blocks(slot, group.id, self.sizes)
            named = {"reader": step.readers, "writer": step.writers}.get(slot.role, {})
            if step.keep is not None and slot.parameter not in named:
                new = select_channels(tensor, slot.axis, blocks, n, step.keep)
            else:
                matrix = _matrix(step, slot)
                if matrix.shape[-1] > n:  # of all places at once
                    blocks, length = (Block(0),), matrix.shape[-1]
                else:
                    length = n
                new = merge_channels(tensor, slot.axis, blocks, length, matrix)
            self.state[slot.parameter] = new
        self._merge_statistics(step, group, before)
        self.sizes[group.id] = step.width
        self._rescale_with(group, n)
        for weight in sorted({*step.writer_gain, *step.writer_shift}):
            at = next(s for s in group.writers + group.carriers if s.parameter == weight)
            blocks = self.graph.blocks(at, group.id, self.sizes)
            size = self.state[weight].shape[at.axis]
            gain, shift = torch.ones(size), torch.zeros(size)
            put_channels(gain, blocks, step.writer_gain.get(weight), step.width)
            put_channels(shift, blocks, step.writer_shift.get(weight), step.width)
            self.rescale(weight, gain, shift)
            if weight in self.statistics:
                mean, std = self.statistics[weight]
                gain, shift = gain.to(mean), shift.to(mean)
                self.statistics[weight] = mean * gain + shift, std * gain.abs()
        for weight in sorted({*step.gain, *step.shift}):
            self.rescale(weight, step.gain.get(weight), step.shift.get(weight))

    def _rescale_with(self, group: ChannelGroup, old: int) -> None:
        """Let the outputs of layers follow a size that has changed (`Rescale`)."""
        for item in self.graph.rescales:
            if group.id not in leaves(item.over):
                continue
            size = tree_size(item.over, self.sizes)
            was = tree_size(item.over, {**self.sizes, group.id: old})
            start, length = (tree_size(tree, self.sizes) for tree in (item.before, item.part))
            for name, axis in ((item.weight, item.axis), (item.bias, 0)):
                if name in self.state:
                    tensor = self.state[name].clone()
                    ratio = (size / was) ** item.exponent
                    own = tensor.narrow(axis, start, length)
                    own.mul_(ratio).add_(item.offset * (ratio - 1))
                    self.state[name] = tensor

    def _merge_statistics(
        self, step: MergeMap, group: ChannelGroup, before: Mapping[str, Tensor]
    ) -> None:
        """Let the statistics of a layer's outputs follow its merged outputs.

        Outputs that are merged count as correlated as the weights that write them.
        """
        for slot in group.writers + group.carriers:
            layer = self.graph.layers.get(slot.parameter)
            if slot.parameter not in self.statistics or layer is None:
                continue
            if slot.axis != layer.output_axis:
                continue
            n = self.sizes[group.id]
            blocks = self.graph.blocks(slot, group.id, self.sizes)
            mean, std = self.statistics[slot.parameter]
            if step.keep is not None:
                mean, std = (select_channels(t, 0, blocks, n, step.keep) for t in (mean, std))
            else:
                rows = channel_rows(before[slot.parameter], slot.axis, blocks, n).float()
                relation = torch.nn.functional.normalize(rows, dim=1)
                own = channel_rows(std, 0, blocks, n).float().mean(1, keepdim=True)
                spread = (step.encode.to(own) @ (relation * own)).norm(dim=1)
                mean = merge_channels(mean, 0, blocks, n, step.encode)
                std = merge_channels(std, 0, blocks, n, step.encode)
                after = self.graph.blocks(slot, group.id, {**self.sizes, group.id: step.width})
                put_channels(std, after, spread, step.width)
            self.statistics[slot.parameter] = mean, std

    def rescale(self, weight: str, gain: Tensor | None, shift: Tensor | None) -> None:
        """Multiply the outputs of a layer by a gain and add a shift, both (outputs,).

        Raises:
            IntrafuseError: the layer has no bias and its module cannot hold one.
        """
        layer = self.graph.layers[weight]
        tensor = self.state[weight]
        if gain is not None:
            self.state[weight] = _scale_outputs(
                tensor, layer.output_axis, gain.to(tensor.device)
            ).to(tensor)
            gain = gain.to(tensor)
        bias = self.state.get(layer.bias) if layer.bias is not None else None
        if bias is not None and gain is not None:
            bias = bias * gain
        if shift is not None and (bias is not None or bool((shift != 0).any())):
            if layer.bias is None:
                raise IntrafuseError("a layer that is shifted needs a bias", layer=layer.name)
            bias = shift.to(tensor) if bias is None else bias + shift.to(tensor)
        if bias is not None:
            assert layer.bias is not None
            self.state[layer.bias] = bias


def _scale_outputs(weight: Tensor, axis: int, gain: Tensor) -> Tensor:
    """Multiply each output of a layer's weight by its gain (outputs,)."""
    shape = [1] * weight.dim()
    groups = len(gain) // weight.shape[axis]
    if groups <= 1:
        shape[axis] = -1
        return weight * gain.view(shape)
    # A grouped transposed convolution: weight (groups x inputs, outputs / groups, kernel...).
    blocks = weight.unflatten(0, (groups, -1))
    return (blocks * gain.view(groups, 1, -1, *shape[2:])).flatten(0, 1)


def _finite(tensor: Tensor, infinite: bool) -> bool:
    return not bool((tensor.isnan() if infinite else ~torch.isfinite(tensor)).any())


def _matrix(step: MergeMap, slot: Slot) -> Tensor:
    """Choose what one slot is multiplied with: (m, n), or for its places as `MergeMap` says."""
    if slot.role == "reader":
        return step.decoder(slot.parameter).T
    if slot.role == "writer" and slot.parameter in step.writers:
        return step.writers[slot.parameter]
    return step.carry if slot.kind in ("scale", "variance") else step.encode
