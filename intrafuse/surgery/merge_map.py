"""The merge map: the change of one group's channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from intrafuse.graph.axes import Block
from intrafuse.graph.blocks import merge_channels, select_channels
from intrafuse.graph.groups import Slot
from intrafuse.graph.typed import integers
from intrafuse.support.errors import IntrafuseError

__all__ = ["PARTS", "Change", "MergeMap"]

# Fields that hold tensors by parameter name.
PARTS = ("readers", "writers", "gain", "shift", "writer_gain", "writer_shift")


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """The change of the channels along one axis.

    Attributes:
        kind: `select` indexes the channels by `tensor` (m,). `combine` multiplies them by `tensor`
            (m, n), or by one matrix for each of r places, (r, m, n). `mix` multiplies a whole
            axis, which holds only the r places of each channel, by `tensor` (m r, n r).
        tensor: indices or matrix.
    """

    kind: Literal["select", "combine", "mix"]
    tensor: Tensor

    def apply(self, tensor: Tensor, axis: int, blocks: Sequence[Block], channels: int) -> Tensor:
        """Return a tensor with changed channels.

        Args:
            tensor: holds n channels along an axis; it is not changed.
            axis: the axis of the channels.
            blocks: places of the channels along this axis.
            channels: n.
        """
        if self.kind == "select":
            return select_channels(tensor, axis, blocks, channels, self.tensor)
        if self.kind == "mix":
            return merge_channels(tensor, axis, (Block(0),), self.tensor.shape[-1], self.tensor)
        return merge_channels(tensor, axis, blocks, channels, self.tensor)


@dataclass(frozen=True, eq=False)
class MergeMap:
    """Replace the n channels of a group by m.

    Writers become P W, readers W Q, and carriers follow. Matrices are float32.

    Attributes:
        group: name of the channel group.
        encode: P (m, n), for writers' weights and biases and for shifts of carriers.
        decode: Q (n, m), for readers that `readers` does not name.
        carry: (m, n) with rows that sum to one, for scales of carriers.
        keep: (m,) ascending indices of selected channels; None if channels are combined. Writers
            and carriers are then indexed exactly instead of multiplied.
        readers: Q (n, m) by the name of a reader's weight. If each channel lies at r places of an
            axis that holds nothing else, Q may be (n r, m r), from all new places to all old.
        writers: P (r, m, n) by the name of a writer's weight or bias, instead of `encode`, if each
            channel lies at r places (the width of r heads): one matrix for each place.
        gain, shift: (outputs,) by the name of a reader's weight: its outputs are multiplied by
            the gain and then shifted.
        writer_gain, writer_shift: (m,), or (m, r) where a channel has r outputs, by the name of
            the weight of a writer or of a grouped convolution between writers and readers. They
            are applied after P.
        note: the method's note on its choice, as JSON data.
    """

    group: str
    encode: Tensor
    decode: Tensor
    carry: Tensor
    keep: Tensor | None = None
    readers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    writers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    gain: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    shift: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    writer_gain: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    writer_shift: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    note: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def select(
        cls, group: str, size: int, keep: Tensor, **outputs: Mapping[str, Tensor]
    ) -> MergeMap:
        """Make a map that keeps some channels and discards the others.

        >>> MergeMap.select("conv", 3, torch.tensor([2, 0])).encode
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
        """
        keep = keep.cpu().sort().values
        rows = torch.zeros(len(keep), size)
        rows[torch.arange(len(keep)), keep] = 1.0
        return cls(group, rows, rows.T.contiguous(), rows, keep, **outputs)

    @classmethod
    def linear(
        cls,
        group: str,
        encode: Tensor,
        decode: Tensor | None = None,
        **outputs: Mapping[str, Tensor],
    ) -> MergeMap:
        """Make a map from P (m, n) and Q (n, m); Q defaults to the transpose of P.

        Carriers get the weighted mean of their values, with |P| as weights.
        """
        weight = encode.abs()
        carry = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        decode = encode.T if decode is None else decode
        return cls(group, encode, decode.contiguous(), carry, None, **outputs)

    @property
    def size(self) -> int:
        """Number of channels before, n."""
        return self.encode.shape[1]

    @property
    def width(self) -> int:
        """Number of channels after, m."""
        return self.encode.shape[0]

    def decoder(self, weight: str) -> Tensor:
        """Return Q (n, m) for the reader with this weight."""
        return self.readers.get(weight, self.decode)

    @property
    def encoding(self) -> Change:
        """The change of the channels themselves, in activations or statistics."""
        if self.keep is not None:
            return Change("select", self.keep)
        return Change("combine", self.encode)

    def change(self, slot: Slot) -> Change:
        """Return the change of one slot of the group."""
        if slot.role == "reader":
            if self.keep is not None and slot.parameter not in self.readers:
                return self.encoding
            matrix = self.decoder(slot.parameter)
            return Change("mix" if self._places(matrix) > 1 else "combine", matrix.T)
        if slot.role == "writer" and slot.parameter in self.writers:
            return Change("combine", self.writers[slot.parameter])
        if self.keep is None and slot.kind in ("scale", "variance"):
            return Change("combine", self.carry)
        return self.encoding

    def _places(self, matrix: Tensor) -> int:
        """Count the places r of each channel that a reader's Q (n r, m r) reads one by one."""
        return max(1, len(matrix) // self.size)

    def tensors(self) -> dict[str, Tensor]:
        """List every tensor of the map by a name that `from_tensors` understands."""
        tensors = {"encode": self.encode, "decode": self.decode, "carry": self.carry}
        if self.keep is not None:
            tensors["keep"] = self.keep
        for part in PARTS:
            tensors.update({f"{part}:{name}": t for name, t in getattr(self, part).items()})
        return tensors

    @classmethod
    def from_tensors(cls, group: str, tensors: Mapping[str, Tensor]) -> MergeMap:
        """Rebuild a map from the result of `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in PARTS}
        for name, tensor in tensors.items():
            part, colon, parameter = name.partition(":")
            if colon:
                parts[part][parameter] = tensor
        encode, decode, carry = (tensors[name] for name in ("encode", "decode", "carry"))
        return cls(group, encode, decode, carry, tensors.get("keep"), **parts)

    def check(self) -> MergeMap:
        """Return the map itself; refuse it if shapes do not fit or values are not finite.

        Raises:
            IntrafuseError: a matrix has the wrong shape, a tensor holds NaN or infinity, or `keep`
                does not ascend.
        """
        n, m = self.size, self.width
        shapes = {"encode": (m, n), "decode": (n, m), "carry": (m, n), "keep": (m,)}
        for name, matrix in self.readers.items():
            places = self._places(matrix)
            shapes[f"readers:{name}"] = (n * places, m * places)
        shapes |= {f"writers:{name}": (*p.shape[:1], m, n) for name, p in self.writers.items()}
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
                raise IntrafuseError(
                    f"{name} of a merge map must have the shape {shapes[name]}",
                    value=tuple(tensor.shape),
                    layer=self.group,
                )
            if not torch.isfinite(tensor).all():
                raise IntrafuseError(
                    f"merge maps must be finite, but {name} is not",
                    layer=self.group,
                    remedy="check the weights, the importance and the settings of the method",
                )
        if self.keep is not None and not _ascends(self.keep, n):
            raise IntrafuseError(
                f"keep of a merge map must hold ascending channels below {n}",
                value=integers(self.keep),
                layer=self.group,
            )
        return self


def _ascends(keep: Tensor, channels: int) -> bool:
    return bool((keep.diff(prepend=keep.new_tensor([-1])) > 0).all()) and int(keep[-1]) < channels
