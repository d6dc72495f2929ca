"""Numbers in a model's modules that may be sizes although the traced code does not read them.

Another code path may read them: a forward for exporters only, a cache, a reset of the head. A
number belongs to the axis of its size on the nearest parameters below its module. If there are
several axes of that size, the number follows them while they stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import new_class
from typing import Any

from torch import nn

from intrafuse.graph.axes import Product, Sum, Tree, leaves, tree_size
from intrafuse.graph.groups import Hint
from intrafuse.graph.sizes.trials import Key, Trials
from intrafuse.graph.typed import named_modules
from intrafuse.support.modules import held_sizes

__all__ = ["follow_unread", "watch"]


def follow_unread(trials: Trials, atoms: list[int], works: Callable[[list[int]], bool]) -> bool:
    """Record numbers that the code does not read, with their possible axes, in `Scope.hints`.

    Args:
        trials: the results of the trials so far.
        atoms: the prunable atoms.
        works: tells whether the model agrees with the graph at other sizes of some atoms. It also
            records in `Trials.reads` which numbers the code reads.

    Returns:
        Whether the model agrees with the graph.
    """
    scope, free = trials.scope, set(atoms)
    axes = {n: [*map(scope.table.resolve, trees)] for n, trees in scope.parameter_axes.items()}
    known = {*trials.attributes, *((a.module, a.name) for a in scope.attributes)}
    named = {
        key: trees
        for key, trees in _named_sizes(scope.model, axes, scope.table.size, known).items()
        if any(not free.isdisjoint(leaves(tree)) for tree in trees)
    }
    if not named:
        return False
    trials.reads = dict.fromkeys(named, False)
    if not works(atoms):
        return False
    unread = [key for key in named if not trials.reads[key]]
    scope.hints += [Hint(module, name, named[module, name]) for module, name in unread]
    return True


def watch(model: nn.Module, reads: dict[Key, bool]) -> None:
    """Make a copy of a model record in `reads` which of the given numbers its code reads."""
    watched: dict[str, set[str]] = {}
    for path, name in reads:
        watched.setdefault(path, set()).add(name)
    for path, names in watched.items():
        module = model.get_submodule(path)
        try:
            module.__class__ = _watching(type(module), path, names, reads)
        except TypeError:  # a class that cannot be replaced
            reads.update({(path, name): True for name in names})


def _watching(kind: Any, path: str, names: set[str], reads: dict[Key, bool]) -> type:
    def __getattribute__(self: object, name: str) -> object:
        if name in names:
            reads[path, name] = True
        return kind.__getattribute__(self, name)

    body = {"__getattribute__": __getattribute__, "__module__": kind.__module__}
    return new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))


def _named_sizes(
    model: nn.Module,
    axes: Mapping[str, Sequence[Tree]],
    sizes: Mapping[int, int] | Sequence[int],
    known: Collection[Key],
) -> dict[Key, tuple[Tree, ...]]:
    """Map numbers that modules hold to their possible axes.

    PyTorch's own modules are skipped, because rules handle their attributes. Numbers in lists and
    dictionaries are skipped, because they may be other settings, such as those of training.

    Args:
        model: the network.
        axes: the trees of every parameter.
        sizes: the size of every atom.
        known: (module, name) of numbers that already follow an axis.

    Returns:
        (module, name) -> trees of that size on the nearest parameters with such an axis.
    """
    below = _below(axes)
    parts = {name: _by_size(trees, sizes) for name, trees in axes.items()}
    found: dict[Key, tuple[Tree, ...]] = {}
    for path, module in named_modules(model):
        if type(module).__module__.startswith("torch."):
            continue
        for name, value, holder in held_sizes(module):
            if value < 2 or holder is not module or name.startswith("_") or (path, name) in known:
                continue
            nearest = _nearest(below.get(path, {}), parts, value)
            if nearest:
                found[path, name] = nearest
    return found


def _below(axes: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """List the parameters below each module, by the number of modules in between."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in axes:
        owners = name.split(".")[:-1]
        for depth in range(len(owners) + 1):
            path = ".".join(owners[: len(owners) - depth])
            found.setdefault(path, {}).setdefault(depth, []).append(name)
    return found


def _nearest(
    below: Mapping[int, Sequence[str]],
    parts: Mapping[str, Mapping[int, Sequence[Tree]]],
    value: int,
) -> tuple[Tree, ...]:
    for depth in sorted(below):
        found = [tree for name in below[depth] for tree in parts[name].get(value, ())]
        if found:
            return tuple(dict.fromkeys(found))
    return ()


def _by_size(
    trees: Sequence[Tree], sizes: Mapping[int, int] | Sequence[int]
) -> dict[int, list[Tree]]:
    found: dict[int, list[Tree]] = {}
    for tree in trees:
        for part in _parts(tree):
            found.setdefault(tree_size(part, sizes), []).append(part)
    return found


def _parts(tree: Tree) -> Iterator[Tree]:
    """Iterate over an axis, its parts, and runs of adjacent factors."""
    yield tree
    if isinstance(tree, Sum):
        for part in tree.parts:
            yield from _parts(part)
    elif isinstance(tree, Product):
        n = len(tree.factors)
        for i in range(n):
            yield from _parts(tree.factors[i])
            yield from (Product(tree.factors[i:j]) for j in range(i + 2, n + 1) if j - i < n)
