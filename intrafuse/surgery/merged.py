"""Change the outputs of a layer as a plan changes the layer that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from intrafuse.graph.axes import Block, Tree, leaves, locate, tree_size
from intrafuse.graph.blocks import put_channels
from intrafuse.graph.groups import ChannelGraph
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["merged_output", "scale_outputs"]


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
                ratio = tree_size(item.over, sizes) / tree_size(item.over, before)
                start, length = (tree_size(part, sizes) for part in (item.before, item.part))
                output = output.clone()
                output.narrow(axis, start, length).mul_(ratio**item.exponent)
    return output


def _rescaled(
    merge_map: MergeMap, layer: str | None, output: Tensor, axis: int, where: Sequence[Block]
) -> Tensor:
    """Scale and shift merged channels by the gains and shifts of their writer."""
    gain, shift = (
        values.get(layer or "") for values in (merge_map.writer_gain, merge_map.writer_shift)
    )
    if gain is None and shift is None:
        return output
    lines = torch.ones(output.shape[axis]), torch.zeros(output.shape[axis])
    for line, values in zip(lines, (gain, shift), strict=True):
        put_channels(line, where, values, merge_map.width)
    scale, offset = (
        line.to(output).view([-1 if i == axis else 1 for i in range(output.dim())])
        for line in lines
    )
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
