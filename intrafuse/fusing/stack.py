"""Stack the channels of several networks side by side in one wide network: their union.

The layers of the union are block-diagonal, so each network computes the same as before. Layers that
write channels of fixed size (the outputs) add the networks up, each with its weight. The union of
classifiers computes the weighted mean of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from intrafuse.allocation.budget import measure
from intrafuse.graph import ExampleInputs
from intrafuse.graph.axes import Sum, Tree, tree_size
from intrafuse.graph.groups import ChannelGraph
from intrafuse.importance.metrics import score
from intrafuse.methods.moment import Moment
from intrafuse.pruning.each_group import merge_groups
from intrafuse.pruning.plan import Plan
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = ["shrink", "stack"]

Sizes = Mapping[int, int]


def stack(graph: ChannelGraph, networks: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Build the tensors of the union of several networks.

    Args:
        graph: the channel graph of the reference; its atoms stand for those of all networks.
        networks: the tensors of each network, of the same structure.
        shares: the weight of each network, summing to one.

    Returns:
        Tensors whose groups hold the channels of all networks, one after the other.

    Raises:
        IntrafuseError: a tensor writes channels along the input axis of a layer (the outputs share
            a weight with the inputs).
    """
    names = [group.name for group in graph.groups]
    widths = [{n: net.graph.by_name[n].size for n in names} for net in networks]
    total = {name: sum(width[name] for width in widths) for name in names}
    sizes_of_all, tensors = graph.resized(total), {}
    written = _written(graph)
    for name in sorted(graph.axes):
        present = [(k, net.state[name]) for k, net in enumerate(networks) if name in net.state]
        if not present or not present[0][1].is_floating_point():
            continue
        tensor = present[0][1].new_zeros(graph.shape(name, sizes_of_all))
        for k, part in present:
            before = {n: sum(width[n] for width in widths[:k]) for n in names}
            offsets = {graph.by_name[n].id: start for n, start in before.items()}
            sizes = graph.resized(widths[k])
            trees = graph.axes[name]
            where = [torch.from_numpy(_places(t, sizes, sizes_of_all, offsets)) for t in trees]
            scaled = _scaled(part.to(tensor), trees, written.get(name), sizes, offsets, shares[k])
            if where:
                index = torch.meshgrid(*where, indexing="ij")
                tensor.index_put_(tuple(i.to(tensor.device) for i in index), scaled, True)
            else:
                tensor += scaled
        tensors[name] = tensor
    return Weights(graph, tensors, widths=total)


def shrink(
    model: nn.Module,
    weights: Weights,
    widths: Mapping[str, int],
    method: Moment,
    example_inputs: ExampleInputs,
    data: Sequence | None = None,
    seed: int = 0,
) -> Plan:
    """Reduce groups to given widths by matching moments, from input to output.

    Args:
        model: the module that holds the tensors.
        weights: its tensors, with batch norm folded and its statistics noted; they are merged.
        widths: channels to keep, by group name; groups of this width do not change.
        method: the method, with its settings.
        example_inputs, data, seed: for the method.

    Returns:
        The applied plan.
    """
    graph = weights.graph
    before = measure(graph, graph.sizes, weights.counted())
    context = Context(weights, weights.snapshot(), model, example_inputs, data, seed)
    scores = {group.name: score(group, context, "l2") for group in graph.groups}
    maps, solved = merge_groups(method, graph.groups, scores, widths, context)
    after = measure(graph, weights.sizes, weights.counted())
    settings = {"method": {"name": method.name}, "seed": seed}
    return Plan(graph, maps, False, settings, before, after, solved=solved)


def _written(graph: ChannelGraph) -> dict[str, int]:
    """Find the axis of each parameter on which it writes or carries prunable channels."""
    axes: dict[str, int] = {}
    reads = {slot.parameter for group in graph.groups for slot in group.readers}
    for group in graph.groups:
        for slot in group.writers + group.carriers:
            axes[slot.parameter] = slot.axis
    for name in sorted(reads & axes.keys()):
        layer = graph.layers.get(name)
        if layer is not None and axes[name] == layer.input_axis:
            raise IntrafuseError(
                "networks whose outputs share a weight with their inputs cannot be stacked",
                layer=layer.name,
                remedy='use method="ot"',
            )
    return axes


def _scaled(
    part: Tensor, trees: tuple[Tree, ...], axis: int | None, sizes: Sizes, free: Sizes, share: float
) -> Tensor:
    """Scale values that all networks write to the same positions by this network's weight."""
    if axis is None:
        return part * share
    own = torch.from_numpy(_is_own(trees[axis], sizes, free))
    factor = torch.where(own, 1.0, share).to(part)
    return part * factor.view([-1 if i == axis else 1 for i in range(part.dim())])


def _places(tree: Tree, sizes: Sizes, union: Sizes, offsets: Sizes) -> np.ndarray:
    """Map each position along an axis of one network to its position in the union."""
    if isinstance(tree, int):
        return np.arange(sizes[tree]) + offsets.get(tree, 0)
    if isinstance(tree, Sum):
        starts = np.cumsum([0, *(tree_size(part, union) for part in tree.parts)])
        parts = [_places(part, sizes, union, offsets) for part in tree.parts]
        return np.concatenate([start + p for start, p in zip(starts, parts, strict=False)])
    places = np.zeros(1, dtype=np.int64)
    for factor in tree.factors:
        inner = _places(factor, sizes, union, offsets)
        places = (places[:, None] * tree_size(factor, union) + inner).ravel()
    return places


def _is_own(tree: Tree, sizes: Sizes, free: Sizes) -> np.ndarray:
    """Tell which positions along an axis belong to prunable channels."""
    if isinstance(tree, int):
        return np.full(sizes[tree], tree in free)
    if isinstance(tree, Sum):
        return np.concatenate([_is_own(part, sizes, free) for part in tree.parts])
    own = np.zeros(1, dtype=bool)
    for factor in tree.factors:
        own = (own[:, None] | _is_own(factor, sizes, free)).ravel()
    return own
