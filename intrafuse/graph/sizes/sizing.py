"""Choose the sizes of a trial.

If two axes have equal sizes, a trace does not show which one a number belongs to. So in a trial
different axes of one module must have different sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from intrafuse.graph.axes import Tree, tree_size

__all__ = ["trial_sizes"]

PATTERNS = 6  # patterns of sizes to compare
LARGE = 64  # sizes from here on vary more


def trial_sizes(
    traced: Sequence[int], atoms: Sequence[int], met: Iterable[frozenset[Tree]], *, smaller: bool
) -> dict[int, int]:
    """Choose new sizes for some atoms: none keeps its size, and different axes differ.

    Args:
        traced: the size of every atom.
        atoms: the atoms that change.
        met: for each module, the trees that occur in it. The choice minimizes the number of
            different trees that have equal sizes.
        smaller: shrink atoms, as pruning does, if they have at least three channels.
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
