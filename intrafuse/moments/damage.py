"""Predicted damage: the error of the readers' outputs at each width of each group.

If a reader explains the share 1 - u of the variance of its old outputs, its outputs have a
noise-to-signal ratio of u / (1 - u) after its gain has restored the variance. If it adds its
outputs to a residual stream, this ratio is weighted by the reader's share of the stream's variance.
The damage of a group is the sum over its readers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from intrafuse.graph.axes import leaves
from intrafuse.graph.groups import ChannelGroup
from intrafuse.moments.explain import unexplained
from intrafuse.moments.propagate import Propagation
from intrafuse.moments.readers import readings
from intrafuse.surgery.weights import Weights

__all__ = ["damage_by_width", "stream_shares"]

MOST = 1e6  # damage of a reader that explains nothing


def damage_by_width(
    groups: Iterable[ChannelGroup], weights: Weights, *, length: float = 1.0
) -> dict[str, np.ndarray]:
    """Predict the damage of each width of each group, for each group alone.

    Args:
        groups: the groups that may shrink.
        weights: the tensors before anything is merged, batch norm folded.
        length: correlation length between neighboring positions, in positions.

    Returns:
        By group name: damage (n + 1,) by width, falling to 0 at n. Groups without moments are left
        out.
    """
    weights = weights.on_cpu()  # once, not for each propagation
    shares = stream_shares(Propagation(weights, length=length))
    propagation = Propagation(weights, length=length, correlated=1.0)
    found = {}
    for group in groups:
        known = readings(group, propagation)
        if known:
            rest = unexplained(list(known.values()))
            noise = np.minimum(rest / np.maximum(1 - rest, 1e-12), MOST)
            found[group.name] = noise @ np.array([shares.get(name, 1.0) for name in known])
    return found


def stream_shares(propagation: Propagation) -> dict[str, float]:
    """Compute the share of each layer in the variance of the residual stream that it adds to.

    Returns:
        By the name of a layer's weight: its variance, divided by the variance of itself and of all
        earlier layers that write the same channels, summed over channels. Layers without moments
        are left out.
    """
    graph = propagation.weights.graph
    variance = {}
    for name, nodes in propagation.calls.items():
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
