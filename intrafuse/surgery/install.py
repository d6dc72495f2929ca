"""Install planned tensors in a module or in a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

from torch import Tensor, nn

from intrafuse.graph.axes import Product, tree_size
from intrafuse.graph.groups import ChannelGraph
from intrafuse.support.modules import copy_without, place
from intrafuse.surgery.hf_config import follow_sizes, take_configuration
from intrafuse.surgery.weights import Weights

__all__ = ["install", "size_changes"]


def install(
    model: nn.Module,
    weights: Weights,
    *,
    remove: Iterable[str] = (),
    inplace: bool = False,
    share: bool = False,
    like: nn.Module | None = None,
) -> nn.Module:
    """Return a module that holds the given tensors, with attributes set to their sizes.

    Args:
        model: the module that the weights were taken from.
        weights: the new tensors.
        remove: paths of modules to replace by `nn.Identity`.
        inplace: change `model` itself instead of a copy.
        share: let the copy hold the model's own parameters where they do not change.
        like: a network of the same sizes, to copy its configuration instead of searching for one,
            which takes time.
    """
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    new = {k: t for k, t in weights.state.items() if k not in old or t is not _detached(old[k], t)}
    kept = [*model.parameters()] if share else []
    target = model if inplace else copy_without(model, [*kept, *(old[k] for k in new if k in old)])
    attributes = weights.graph.attribute_values(weights.sizes)
    place(target, new, attributes, remove, weights.graph.aliases)
    _drop_caches(target)
    if like is None:
        follow_sizes(target, size_changes(weights.graph, weights.sizes))
    else:
        take_configuration(target, like)
    return target


def _drop_caches(model: nn.Module) -> None:
    """Let modules drop what they keep between calls; all modes stay.

    A module may keep tensors that it computed from its parameters, as attention of timm keeps its
    position biases in evaluation mode. It then drops them in its own `train`.
    """
    for module in model.modules():
        if type(module).train is not nn.Module.train:
            modes = [(part, part.training) for part in module.modules()]
            module.train(module.training)
            for part, mode in modes:
                part.training = mode


def size_changes(graph: ChannelGraph, sizes: Mapping[int, int]) -> set[tuple[int, int]]:
    """List changed sizes (before, after) of groups, attributes and axes of parameters."""
    trees = {tree for axes in graph.axes.values() for tree in axes}
    trees |= {item.tree for item in graph.attributes} | {group.id for group in graph.groups}
    for tree in [tree for tree in trees if isinstance(tree, Product)]:  # such as heads x width
        for i, j in combinations(range(len(tree.factors) + 1), 2):
            trees.add(Product(tree.factors[i:j]))
    both = ((tree_size(t, graph.sizes), tree_size(t, sizes)) for t in trees)
    return {(old, new) for old, new in both if old != new}


def _detached(old: Tensor, new: Tensor) -> Tensor | None:
    """Return `new` if it is still the model's own tensor, else None."""
    same = old.data_ptr() == new.data_ptr() and old.shape == new.shape
    return new if same else None
