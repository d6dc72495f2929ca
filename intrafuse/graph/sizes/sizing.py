"""Choose the sizes at which a model's code is tried.

Two numbers that were equal when traced tell nothing of which is which. At the sizes of a trial
different axes of one module must differ, or code that takes one for the other would look right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from intrafuse.graph.axes import Tree, tree_size

__all__ = ["trial_sizes"]

PATTERNS = 6  # of sizes that are compared
LARGE = 64  # from here on sizes vary by more


def trial_sizes(
    traced: Sequence[int], atoms: Sequence[int], met: Iterable[frozenset[Tree]], *, smaller: bool
) -> dict[int, int]:
    """Choose a new size for some atoms: none is the old one, and different axes differ.

    Args:
        traced: the size of every atom.
        atoms: those that change.
        met: the trees that meet in one module, for each module; the fewer of them have equal sizes
            that are different trees, the better.
        smaller: make atoms smaller, as pruning does, where they have three channels or more.
    """
    groups = [group for group in met if len(group) > 1]
    options = [_sizes(traced, atoms, pattern, smaller) for pattern in range(PATTERNS)]
    return min(options, key=lambda sizes: _coincidences(groups, sizes))


def _sizes(
    traced: Sequence[int], atoms: Sequence[int], pattern: int, smaller: bool
) -> dict[int, int]:
    sizes = dict(enumerate(traced))
    for i, atom in enumerate(atoms):
        n, step = sizes[atom], i * (2 * pattern + 1) + pattern
        if n >= LARGE:
            sizes[atom] = n - 1 - step % 31 - (31 if smaller else 0)
        elif smaller and n > 2:
            sizes[atom] = n - 1 - step % (n - 2)
        else:
            sizes[atom] = n + 1 + step % 7
    return sizes


def _coincidences(groups: Iterable[frozenset[Tree]], sizes: Mapping[int, int]) -> int:
    """Count trees beyond the first of each size."""
    return sum(len(g) - len({tree_size(tree, sizes) for tree in g}) for g in groups)
