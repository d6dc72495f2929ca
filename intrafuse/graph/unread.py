"""Numbers that a model's modules hold, that name a size, and that the traced code did not read.

Another path may read them: a forward that only an exporter takes, a cache, a head that is reset.
A number belongs to the axis of its size on the nearest parameters below its module. Where these
have several axes of that size, it names all of them: it follows them as long as they stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from intrafuse.graph.axes import Product, Sum, Tree, leaves, tree_size
from intrafuse.graph.groups import Hint
from intrafuse.graph.trials import Trials
from intrafuse.modules import held_sizes

__all__ = ["follow_unread"]

TRIALS = 12  # of numbers that turn out to be read for something else


def follow_unread(trials: Trials, atoms: list[int], works: Callable[[list[int]], bool]) -> bool:
    """Note numbers that no operator read, with the axes that each may name (`Scope.hints`).

    A number that changes what the model computes was read, for something else: it stays.

    Args:
        trials: what is known.
        atoms: those that may be pruned.
        works: tells whether the model does what the graph expects at other sizes of some atoms.

    Returns:
        Whether the model was found to work.
    """
    scope, free = trials.scope, set(atoms)
    axes = {n: [*map(scope.table.resolve, trees)] for n, trees in scope.parameter_axes.items()}
    known = {*trials.attributes, *((a.module, a.name) for a in scope.attributes)}
    named = {}
    for key, trees in _named_sizes(scope.model, axes, scope.table.size, known).items():
        shrinking = [tree for tree in trees if not free.isdisjoint(leaves(tree))]
        if shrinking:
            named[key] = trees, shrinking[0]
    if not named:
        return False
    attributes = trials.attributes
    try:
        unread = _unread(trials, {key: tree for key, (_, tree) in named.items()}, atoms, works)
    finally:
        trials.attributes = attributes
    scope.hints += [Hint(key[0], key[1], named[key][0]) for key in named if key in unread]
    return bool(unread)


def _unread(
    trials: Trials,
    named: Mapping[tuple[str, str], Tree],
    atoms: list[int],
    works: Callable[[list[int]], bool],
) -> set[tuple[str, str]]:
    """Find by halving which numbers may change without changing what the model computes."""
    kinds: dict[tuple[type, str], list[tuple[str, str]]] = {}
    for path, name in named:
        kind = type(trials.scope.model.get_submodule(path)), name
        kinds.setdefault(kind, []).append((path, name))
    waiting, known = [[*kinds.values()]], trials.attributes
    unread: set[tuple[str, str]] = set()
    for _ in range(TRIALS):
        if not waiting:
            break
        some = waiting.pop()
        more = unread | {key for keys in some for key in keys}
        trials.attributes = {**known, **{key: named[key] for key in more}}
        if works(atoms):
            unread = more
        elif len(some) > 1:
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
    return unread


def _named_sizes(
    model: nn.Module,
    axes: Mapping[str, Sequence[Tree]],
    sizes: Mapping[int, int] | Sequence[int],
    known: Collection[tuple[str, str]],
) -> dict[tuple[str, str], tuple[Tree, ...]]:
    """Map numbers that modules hold to the axes that they may name.

    Modules of PyTorch are left out: rules follow what they hold. So are numbers in lists and
    dictionaries, which may be settings of another kind, such as those of a training.

    Args:
        model: the network.
        axes: the trees of every parameter.
        sizes: of every atom.
        known: (module, name) of numbers that follow an axis already.

    Returns:
        (module, name) -> trees of that size on the nearest parameters that have one.
    """
    below = _below(axes)
    parts = {name: _by_size(trees, sizes) for name, trees in axes.items()}
    found = {}
    for path, module in model.named_modules():
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
    """List the parameters below each module, by how many modules lie between."""
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
    """Iterate over an axis, what it is laid out of, and neighbouring factors together."""
    yield tree
    if isinstance(tree, Sum):
        for part in tree.parts:
            yield from _parts(part)
    elif isinstance(tree, Product):
        n = len(tree.factors)
        for i in range(n):
            yield from _parts(tree.factors[i])
            yield from (Product(tree.factors[i:j]) for j in range(i + 2, n + 1) if j - i < n)
