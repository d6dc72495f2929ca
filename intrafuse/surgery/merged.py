"""Change the outputs of a layer as a plan changes the layer that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from intrafuse.graph.axes import Block, Tree, leaves, locate, tree_size
from intrafuse.graph.blocks import put_channels
from intrafuse.graph.groups import ChannelGraph, Rescale
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["followed", "merged_output", "scale_outputs", "writer_lines"]


def merged_output(
    graph: ChannelGraph, maps: Iterable[MergeMap], tree: Tree, layer: str | None, output: Tensor,
    axis: int = 1,
) -> Tensor:  # fmt: skip
    """Apply the maps of a plan to the output of a layer or norm of the original network.

    Args:
        graph: the channel graph.
        maps: the maps, in the order of application; they encode the channels, then scale and shift
            them.
        tree: the symbolic axis of the output's channels.
        layer: name of the weight that wrote the output, or None.
        output: holds the channels along `axis`, at their traced sizes.
        axis: the dimension of the channels.

    Returns:
        The output that the pruned network should have there.
    """
    axis %= output.dim()
    sizes = dict(graph.sizes)
    for merge_map in maps:
        group = graph.by_name[merge_map.group]
        blocks = locate(tree, group.id, sizes)
        before, sizes[group.id] = dict(sizes), merge_map.width
        if blocks:
            change = merge_map.encoding
            for slot in group.writers:
                if slot.parameter == layer and graph.axes[slot.parameter][slot.axis] == tree:
                    change = merge_map.change(slot)
            output = change.apply(output, axis, blocks, group.size)
            output = _rescaled(merge_map, layer, output, axis, locate(tree, group.id, sizes))
        for item in graph.rescales:
            if item.weight == layer and group.id in leaves(item.over):
                output = followed(item, output, axis, before, sizes)
    return output


def followed(
    item: Rescale, tensor: Tensor, axis: int, before: Mapping[int, int], sizes: Mapping[int, int]
) -> Tensor:
    """Rescale outputs along an axis as a changed size wants it, from its value before."""
    ratio = (tree_size(item.over, sizes) / tree_size(item.over, before)) ** item.exponent
    start, length = (tree_size(tree, sizes) for tree in (item.before, item.part))
    tensor = tensor.clone()
    tensor.narrow(axis, start, length).mul_(ratio).add_(item.offset * (ratio - 1))
    return tensor


def writer_lines(
    merge_map: MergeMap, writer: str, where: Sequence[Block], size: int
) -> tuple[Tensor, Tensor]:
    """Return gain and shift (size,) of a writer, whose outputs may include other groups."""
    gain, shift = torch.ones(size), torch.zeros(size)
    put_channels(gain, where, merge_map.writer_gain.get(writer), merge_map.width)
    put_channels(shift, where, merge_map.writer_shift.get(writer), merge_map.width)
    return gain, shift


def _rescaled(
    merge_map: MergeMap, layer: str | None, output: Tensor, axis: int, where: Sequence[Block]
) -> Tensor:
    """Scale and shift merged channels by the gains and shifts of their writer."""
    if layer is None or layer not in {*merge_map.writer_gain, *merge_map.writer_shift}:
        return output
    shape = [-1 if i == axis else 1 for i in range(output.dim())]
    lines = writer_lines(merge_map, layer, where, output.shape[axis])
    scale, offset = (line.to(output).view(shape) for line in lines)
    return output * scale + offset


def scale_outputs(weight: Tensor, axis: int, gain: Tensor) -> Tensor:
    """Multiply each output of a layer's weight by its gain (outputs,)."""
    shape = [1] * weight.dim()
    groups = len(gain) // weight.shape[axis]
    if groups <= 1:
        shape[axis] = -1
        return weight * gain.view(shape)
    # A grouped transposed convolution: weight (groups x inputs, outputs / groups, kernel...).
    blocks = torch.unflatten(weight, 0, (groups, -1))
    return (blocks * gain.view(groups, 1, -1, *shape[2:])).flatten(0, 1)
