"""Predicted damage: the error that each width of each group adds to what its readers write.

A reader that understands the share 1 - u of its old outputs' variance writes noise and signal as
u to 1 - u once its gain has restored the variance. Where it adds its outputs to a residual
stream, the noise counts as the reader's share in the variance of the stream. The damage of a
group is the sum over its readers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from intrafuse.graph.axes import leaves
from intrafuse.graph.groups import ChannelGroup
from intrafuse.moments.explain import unexplained
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import layer_calls, readings
from intrafuse.surgery.weights import Weights

__all__ = ["damage_by_width", "stream_shares"]

MOST = 1e6  # a reader that understands nothing


def damage_by_width(
    groups: Iterable[ChannelGroup], weights: Weights, *, length: float = 1.0
) -> dict[str, np.ndarray]:
    """Predict what each group's width costs, each group alone.

    Args:
        groups: the groups that may shrink.
        weights: the tensors before anything is merged, batch norm folded.
        length: how far the correlation between neighbouring positions reaches.

    Returns:
        By group name: damage (n + 1,) by width, falling to 0 at n. A group that no moments reach
        is left out.
    """
    weights = weights.on_cpu()  # once, not for each group
    shares = stream_shares(weights, length=length)
    found = {}
    for group in groups:
        known = readings(group, weights, length=length, correlated=1.0)
        if known:
            rest = unexplained(list(known.values()))
            noise = np.minimum(rest / np.maximum(1 - rest, 1e-12), MOST)
            found[group.name] = noise @ np.array([shares.get(name, 1.0) for name in known])
    return found


def stream_shares(weights: Weights, *, length: float = 1.0) -> dict[str, float]:
    """Compute how much of a residual stream's variance each layer that adds to it contributes.

    Returns:
        By the name of a layer's weight: its variance over that of all layers that have written
        the same channels up to it, summed over channels. Layers without moments are left out.
    """
    graph = weights.graph
    propagation = Propagation(weights, length=length)
    variance = {}
    for name, nodes in layer_calls(propagation).items():
        moments = propagation.of(nodes[0])
        if moments is not None:
            variance[name] = float(moments.covariance.diagonal().sum())
    stream: dict[int, float] = {}
    shares = {}
    for name, layer in graph.layers.items():  # in order of execution
        if name not in variance:
            continue
        written = set(leaves(graph.axes[name][layer.output_axis]))
        for atom in written:
            stream[atom] = stream.get(atom, 0.0) + variance[name]
        whole = max((stream[atom] for atom in written), default=0.0)
        if whole > 0:
            shares[name] = variance[name] / whole
    return shares
