"""Observe the outputs of layers on unlabeled inputs, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.graph.axes import Tree, leaves, locate
from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGraph
from intrafuse.support.batches import batches, map_tensors, tensors_of
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.walk import walk

__all__ = ["Point", "activations", "points", "take"]

POSITIONS = 8_192  # most samples times positions to keep per call of a layer, over all batches


@dataclass(frozen=True, slots=True)
class Point:
    """A layer or norm whose outputs can be watched.

    Attributes:
        name: the module's path, or the name of the weight of a function.
        tree: the symbolic axis of its output channels.
        weight, bias: names of its parameters.
        axis: channel axis of the outputs.
        key: the tensor that `walk` knows it by: the weight, or the running mean of a norm.
    """

    name: str
    tree: Tree
    weight: str
    bias: str
    axis: int
    key: str


def points(graph: ChannelGraph, *, norms: bool = False) -> list[Point]:
    """List the layers that write prunable channels, in the order of execution.

    Args:
        graph: the channel graph.
        norms: also list batch norms that follow no layer.
    """
    free = {group.id for group in graph.groups}
    listed = []
    for layer in graph.layers.values():
        if layer.bias is not None and layer.bias in graph.axes:
            name = layer.weight.removesuffix(".weight")
            tree, axis = graph.axes[layer.bias][0], 1 - len(graph.axes[layer.weight])
            listed.append(Point(name, tree, layer.weight, layer.bias, axis, layer.weight))
    for norm in graph.own_norms if norms else ():
        if norm.layer is None and norm.weight is not None and norm.bias is not None:
            tree = graph.axes[norm.mean][0]
            listed.append(Point(norm.name, tree, norm.weight, norm.bias, 1, norm.mean))
    return [point for point in listed if free.intersection(leaves(point.tree))]


def take(data: Any, model: nn.Module, samples: int) -> list[Any]:
    """Take the first samples of the data, in batches.

    Raises:
        IntrafuseError: there is no data, or it does not consist of batches.
    """
    taken, left = [], samples
    for inputs, _ in batches(data, model, purpose='features="activations"'):
        sizes = [len(tensor) if tensor.dim() else 0 for tensor in tensors_of(inputs)]
        if len(set(sizes)) == 1 and sizes[0] > left:
            inputs = map_tensors(lambda t, n=left: t[:n], inputs)
        taken.append(inputs)
        left -= sizes[0] if sizes else 1
        if left <= 0:
            break
    return taken


def activations(
    model: nn.Module, weights: Weights, inputs: Sequence[Any]
) -> dict[str, dict[str, Tensor]]:
    """Observe the channels of every group before their activation function.

    Args:
        model: the module of the network.
        weights: its tensors with batch norm folded, so that the outputs of its layers are the
            inputs of the activation functions.
        inputs: batches; positions are drawn at random, the same in every network.

    Returns:
        {group: {layer: (channels, values)}}, with an entry for each layer that writes the group.

    Raises:
        IntrafuseError: an activation is not finite, or no layer writes a group.
    """
    graph, seen = weights.graph, dict[str, list[Tensor]]()
    watched = points(graph)

    def keep(point: Point, output: Tensor) -> None:
        lines = output.movedim(point.axis, -1).flatten(0, -2)
        if len(lines) > POSITIONS // len(inputs):
            generator = torch.Generator().manual_seed(len(lines))
            chosen = torch.randperm(len(lines), generator=generator)
            lines = lines[chosen[: max(1, POSITIONS // len(inputs))].sort().values.to(lines.device)]
        # a copy, because later operators may write into the output
        seen.setdefault(point.name, []).append(lines.to("cpu", copy=True))

    walk(model, [weights], inputs, {point.key: partial(keep, point) for point in watched})
    features: dict[str, dict[str, Tensor]] = {group.name: {} for group in graph.groups}
    for point in watched:
        if point.name not in seen:
            continue
        lines = torch.cat(seen.pop(point.name))
        if not torch.isfinite(lines).all():
            raise IntrafuseError("activations must be finite on the data", layer=point.name)
        for group in graph.groups:
            blocks = locate(point.tree, group.id, graph.sizes)
            if blocks:
                where = torch.from_numpy(positions(blocks, group.size))
                features[group.name][point.name] = lines[:, where].transpose(0, 1).flatten(1)
    for name, rows in features.items():
        if not rows:
            raise IntrafuseError(
                "the activations of a group cannot be observed: no layer writes it",
                layer=name,
                remedy='use features="weights"',
            )
    return features
