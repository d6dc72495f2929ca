"""The tensors of a network while it is planned, without the module that owns them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from intrafuse.graph.axes import leaves
from intrafuse.graph.blocks import channel_rows, put_channels
from intrafuse.graph.groups import ChannelGraph, ChannelGroup, Norm, Slot
from intrafuse.graph.typed import length
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.handles import Checked, Held, Loading, require_finite, require_fit
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.merged import followed, scale_outputs, writer_lines

__all__ = ["Statistics", "Weights"]

Statistics = tuple[Tensor, Tensor]  # mean and standard deviation (outputs,) of a layer's output


class Weights:
    """The one owner of a network's tensors while it is planned, merged and repaired.

    Tensors, sizes and statistics are read through read-only views. Only these operations change
    them: `merge`, `rescale`, `fold`, `put`, `note`, `forget` and `resume`. Each operation updates
    tensors, sizes and statistics together. It replaces tensors instead of writing into them, so the
    original model does not change.

    `Weights` changes in place, instead of returning a new object for each merge, because planner,
    methods and moments read the same shrinking network (`Context.weights`). A replaced tensor is
    freed at once, and no caller can continue with outdated weights. A `snapshot` keeps a state: it
    shares the tensors and copies only the dictionaries.

    A tensor may be held as a `Handle`, which is read from its file each time it is asked for. So a
    network larger than memory can be planned and merged, one group after the other.

    Args:
        graph: the channel graph of the traced network.
        state: its tensors, or handles of them, by name; aliases of shared parameters are left out.
        buffers: names of the buffers among them.
        widths: channels of the groups whose sizes differ from the traced ones, by name.
        keep: called with name and tensor of each change; returns what is held in its place.
            Snapshots hold their changes themselves.

    >>> from intrafuse.graph.trace import trace
    >>> layer = nn.Linear(1, 1)
    >>> Weights.of(trace(layer, torch.zeros(1, 1)), layer).state["weight"] = torch.ones(1, 1)
    Traceback (most recent call last):
    TypeError: 'mappingproxy' object does not support item assignment
    """

    def __init__(
        self,
        graph: ChannelGraph,
        state: Mapping[str, Held],
        buffers: Iterable[str] = (),
        widths: Mapping[str, int] | None = None,
        keep: Callable[[str, Tensor], Held] | None = None,
    ) -> None:
        self.graph = graph
        self.buffers = frozenset(buffers)
        named = {name: held for name, held in state.items() if name not in graph.aliases}
        self._state: dict[str, Held] = {
            k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()
        }
        self._keep = keep
        self._loads = keep is not None or any(not isinstance(v, Tensor) for v in named.values())
        self._sizes = graph.resized(widths or {})
        self._statistics: dict[str, Statistics] = {}
        self._folded: frozenset[str] = frozenset()

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name; shared parameters under one name."""
        if self._loads:
            return Loading(self._state)
        return MappingProxyType(cast("dict[str, Tensor]", self._state))

    @property
    def held(self) -> Mapping[str, Held]:
        """What is held by each name: a tensor or a handle; another object after each change."""
        return MappingProxyType(self._state)

    @property
    def sizes(self) -> Mapping[int, int]:
        """The current size of every atom; a merged group has its new width."""
        return MappingProxyType(self._sizes)

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """Mean and standard deviation of layers' outputs, by the names of their weights.

        Known for layers with a folded batch norm, and where `note` has set them.
        """
        return MappingProxyType(self._statistics)

    @property
    def folded(self) -> frozenset[str]:
        """The folded batch norms, by the names of their running means.

        They only scale and shift their inputs, and hold no statistics of them.
        """
        return self._folded

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        model: nn.Module,
        held: Mapping[str, Held] | None = None,
        keep: Callable[[str, Tensor], Held] | None = None,
    ) -> Weights:
        """Take the tensors of a model, without copying them.

        A module cannot record that a batch norm is already folded. A norm that holds exactly the
        statistics that `fold` leaves is treated as folded.

        Args:
            graph: the channel graph of the model.
            model: the network.
            held: tensors, or handles of them, in place of the model's, by name. The numbers of a
                handle are checked when it is first loaded.
            keep: as for `Weights`.

        Raises:
            IntrafuseError: a tensor of the graph is missing, has another shape, has fewer than 16
                bits, or is not finite.
        """
        buffers = dict(model.named_buffers())
        own = {**dict(model.named_parameters()), **buffers, **(held or {})}
        weights = cls(graph, own, buffers, keep=keep)
        optional = {layer.bias for layer in graph.layers.values()}
        missing = sorted(n for n in graph.axes if n not in weights.held and n not in optional)
        if missing:
            raise IntrafuseError(
                "the model lacks parameters of the model that the plan was made for",
                value=missing,
                remedy="make the plan from this model",
            )
        slots = {slot.parameter for group in graph.groups for slot in group.slots}
        for name, tensor in [*weights.held.items()]:
            infinite = name in buffers and name not in slots  # attention masks hold -inf
            if name in graph.axes:
                require_fit(graph, name, tensor, name in slots)
                if isinstance(tensor, Tensor):
                    require_finite(name, tensor, infinite=infinite)
            if not isinstance(tensor, Tensor):
                weights._state[name] = Checked(tensor, name, infinite)
        passing = (norm.mean for norm in graph.norms if _was_folded(norm, weights.state))
        weights._folded = frozenset(passing)
        return weights

    def rows(self, group: ChannelGroup, slot: Slot) -> Tensor:
        """Return the channels of a group in one slot as rows (channels, elements)."""
        blocks = self.graph.blocks(slot, group.id, self.sizes)
        return channel_rows(self.state[slot.parameter], slot.axis, blocks, self.sizes[group.id])

    def present(self, slots: tuple[Slot, ...]) -> list[Slot]:
        """Return the slots whose parameter exists; a layer may lack a bias."""
        return [slot for slot in slots if slot.parameter in self._state]

    def counted(self) -> dict[str, int]:
        """Count the elements of every parameter, by name, without buffers."""
        return {name: t.numel() for name, t in self._state.items() if name not in self.buffers}

    # -- copies ----------------------------------------------------------------------------------

    def snapshot(self) -> Weights:
        """Return a copy that shares the tensors; later changes do not affect it."""
        return self.moved(lambda tensor: tensor)

    def on_cpu(self) -> Weights:
        """Return a copy on the CPU, or itself if all tensors are there already."""
        tensors = (tensor for tensor in self._state.values() if isinstance(tensor, Tensor))
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return self
        return self.moved(lambda tensor: tensor.cpu())

    def moved(self, move: Callable[[Tensor], Tensor]) -> Weights:
        """Return a copy with `move(tensor)` in place of each tensor and statistic.

        Handles stay as they are.
        """
        copy = Weights(self.graph, {}, self.buffers)
        copy._state = {k: move(t) if isinstance(t, Tensor) else t for k, t in self._state.items()}
        copy._loads = self._loads
        copy._statistics = {
            k: (move(mean), move(std)) for k, (mean, std) in self._statistics.items()
        }
        copy._sizes, copy._folded = dict(self._sizes), self._folded
        return copy

    # -- changes ---------------------------------------------------------------------------------

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace parameters and buffers by tensors of the same shapes.

        Records of folded norms and of statistics stay unchanged.

        Raises:
            ValueError: a tensor of the graph has another shape.
        """
        for name, tensor in tensors.items():
            if name in self.graph.axes:
                wanted = self.graph.shape(name, self.sizes)
                if tuple(tensor.shape) != wanted:
                    raise ValueError(f"{name} must have the shape {wanted}: {tuple(tensor.shape)}")
        for name, tensor in tensors.items():
            self._set(name, tensor)

    def resume(
        self,
        held: Mapping[str, Held],
        widths: Mapping[str, int],
        statistics: Mapping[str, Statistics],
    ) -> None:
        """Take up what an earlier run had made of the same network.

        Args:
            held: the tensors that it had changed, or handles of them, by name.
            widths: channels of the groups that it had merged, by name.
            statistics: the statistics of layers that it knew.
        """
        self._state.update(held)
        self._sizes = self.graph.resized(widths)
        self._statistics = dict(statistics)

    def _set(self, name: str, tensor: Tensor) -> None:
        self._state[name] = tensor if self._keep is None else self._keep(name, tensor)

    def note(self, weight: str, mean: Tensor, std: Tensor) -> None:
        """Record mean and standard deviation (outputs,) of a layer's current outputs."""
        self._statistics[weight] = mean, std

    def forget(self) -> None:
        """Forget the statistics of all layers, before changes that would invalidate them."""
        self._statistics.clear()

    def fold(self, norm: Norm) -> None:
        """Fold a batch norm into the preceding layer, and note the statistics that it tells.

        The norm then has mean 0 and variance 1 - eps. If it follows a layer, it also has weight 1
        and bias 0. Otherwise its weight and bias hold its whole scale and shift; a norm without
        layer, weight and bias does not change.

        Args:
            norm: a batch norm of the graph, which shares no tensor with another.
        """
        scale, shift = self._affine(norm)
        mean, variance = self.state[norm.mean], self.state[norm.variance]
        if norm.layer is not None:
            gamma = self.state[norm.weight] if norm.weight else torch.ones_like(mean)
            beta = self.state[norm.bias] if norm.bias else torch.zeros_like(mean)
            spread = gamma.abs() * (variance / (variance + norm.eps)).sqrt()
            self.rescale(norm.layer, scale, shift)
            self.note(norm.layer, beta, spread)
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        elif norm.weight is None or norm.bias is None:
            return
        if norm.weight is not None:
            self._set(norm.weight, scale.to(mean))
        if norm.bias is not None:
            self._set(norm.bias, shift.to(mean))
        self._set(norm.mean, torch.zeros_like(mean))
        self._set(norm.variance, torch.full_like(variance, 1 - norm.eps))
        self._folded |= {norm.mean}

    def _affine(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift (channels,) that a norm applies, in float64."""
        scale = (self.state[norm.variance].double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * self.state[norm.weight].double()
        shift = -self.state[norm.mean].double() * scale
        if norm.bias is not None:
            shift = shift + self.state[norm.bias].double()
        return scale, shift

    def merge(self, merge_map: MergeMap) -> None:
        """Apply one merge map.

        Gains and shifts of readers restore the statistics of their outputs, so the noted
        statistics stay. Gains and shifts of writers change their outputs, so the statistics follow.
        """
        group = self.graph.by_name[merge_map.group]
        n = self.sizes[group.id]
        before = Loading(dict(self._state))
        for slot in self.present(group.slots):
            blocks = self.graph.blocks(slot, group.id, self.sizes)
            old = self.state[slot.parameter]
            change = merge_map.change(slot)
            self._set(slot.parameter, change.apply(old, slot.axis, blocks, n))
        self._merge_statistics(merge_map, group, before)
        self._sizes[group.id] = merge_map.width
        self._follow_size(group, n)
        for weight in sorted({*merge_map.writer_gain, *merge_map.writer_shift}):
            at = next(s for s in group.writers + group.carriers if s.parameter == weight)
            blocks = self.graph.blocks(at, group.id, self.sizes)
            size = self._state[weight].shape[at.axis]
            self.rescale(weight, *writer_lines(merge_map, weight, blocks, size))
        for weight in sorted({*merge_map.gain, *merge_map.shift}):
            self._rescale_layer(weight, merge_map.gain.get(weight), merge_map.shift.get(weight))

    def _follow_size(self, group: ChannelGroup, old: int) -> None:
        """Rescale the outputs of layers that depend on a changed size (`Rescale`)."""
        for item in self.graph.rescales:
            if group.id not in leaves(item.over):
                continue
            before = {**self.sizes, group.id: old}
            for name, axis in ((item.weight, item.axis), (item.bias, 0)):
                if name is not None and name in self.state:
                    self._set(name, followed(item, self.state[name], axis, before, self.sizes))

    def _merge_statistics(
        self, merge_map: MergeMap, group: ChannelGroup, before: Mapping[str, Tensor]
    ) -> None:
        """Update the statistics of layers whose outputs were merged.

        The correlation of merged outputs is taken as the cosine of the weights that write them.
        """
        for slot in group.writers + group.carriers:
            layer = self.graph.layers.get(slot.parameter)
            if slot.parameter not in self.statistics or layer is None:
                continue
            if slot.axis != layer.output_axis:  # a grouped transposed convolution
                del self._statistics[slot.parameter]
                continue
            n = self.sizes[group.id]
            blocks = self.graph.blocks(slot, group.id, self.sizes)
            mean, std = self.statistics[slot.parameter]
            change = merge_map.encoding
            merged, deviation = (change.apply(line, 0, blocks, n) for line in (mean, std))
            if change.kind != "select":
                rows = channel_rows(before[slot.parameter], slot.axis, blocks, n).float()
                relation = torch.nn.functional.normalize(rows, dim=1)
                own = channel_rows(std, 0, blocks, n).float().mean(1, keepdim=True)
                spread = length(merge_map.encode.to(own) @ (relation * own), 1)
                after = self.graph.blocks(slot, group.id, {**self.sizes, group.id: merge_map.width})
                put_channels(deviation, after, spread, merge_map.width)
            self.note(slot.parameter, merged, deviation)

    def rescale(self, weight: str, gain: Tensor | None, shift: Tensor | None) -> None:
        """Multiply the outputs of a layer by a gain and add a shift, both (outputs,).

        Updates its statistics too.

        Raises:
            IntrafuseError: the layer has no bias and its module cannot hold one.
        """
        self._rescale_layer(weight, gain, shift)
        if weight not in self.statistics:
            return
        mean, std = self._statistics.pop(weight)
        if all(line is None or len(line) == len(mean) for line in (gain, shift)):
            if gain is not None:
                mean, std = mean * gain.to(mean), std * gain.to(std).abs()
            self.note(weight, mean if shift is None else mean + shift.to(mean), std)

    def _rescale_layer(self, weight: str, gain: Tensor | None, shift: Tensor | None) -> None:
        layer = self.graph.layers[weight]
        tensor = self.state[weight]
        if gain is not None:
            scaled = scale_outputs(tensor, layer.output_axis, gain.to(tensor.device))
            self._set(weight, scaled.to(tensor))
            gain = gain.to(tensor)
        bias = self.state.get(layer.bias) if layer.bias is not None else None
        if bias is not None and gain is not None:
            bias = bias * gain
        if shift is not None and (bias is not None or bool((shift != 0).any())):
            if layer.bias is None:
                raise IntrafuseError("a layer needs a bias to be shifted", layer=layer.name)
            bias = shift.to(tensor) if bias is None else bias + shift.to(tensor)
        if bias is not None:
            assert layer.bias is not None
            self._set(layer.bias, bias)


def _was_folded(norm: Norm, state: Mapping[str, Tensor]) -> bool:
    """Tell whether a norm of a model holds exactly the statistics that folding leaves."""
    mean, variance = state[norm.mean], state[norm.variance]
    return not mean.any() and torch.equal(variance, torch.full_like(variance, 1 - norm.eps))
