"""Symbolic axes: the places of channels along one dimension of a tensor.

A tree describes one axis. Its leaves are *atoms* (integers, each with a size). Its nodes
describe how the atoms lie in memory:

- ``Sum((a, b))``      first all positions of a, then all of b        (cat, split, slice)
- ``Product((a, b))``  position i * |b| + j holds the pair (i, j)  (flatten, view, heads)

`AxisTable` holds the atoms of one trace in a union-find structure. A reshape or a split may refine
an atom into a tree of smaller atoms. After the trace, trees are plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

__all__ = [
    "UNIT",
    "AxisTable",
    "Block",
    "Product",
    "Sum",
    "Tree",
    "layout",
    "leaves",
    "locate",
    "tree_size",
]


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation of parts along one axis."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major product of factors along one axis; a product without factors has one position."""

    factors: tuple[Tree, ...]


Tree = int | Sum | Product
UNIT = Product(())


@dataclass(frozen=True, slots=True)
class Block:
    """The places of n channels along an axis.

    Channel c takes the positions ``offset + r + c * inner + i`` for every i below `inner` and every
    repeat r. The repeats r are all sums of k * stride, with one k below count for each entry of
    `outer`.
    """

    offset: int
    inner: int = 1
    outer: tuple[tuple[int, int], ...] = ()  # (count, stride) of each repeat, outermost first


def tree_size(tree: Tree, sizes: Mapping[int, int] | Sequence[int]) -> int:
    """Count the positions of an axis, given the size of every atom.

    >>> tree_size(Sum((0, Product((1, 2)))), [3, 4, 5])
    23
    """
    if isinstance(tree, int):
        return sizes[tree]
    if isinstance(tree, Sum):
        return sum(tree_size(part, sizes) for part in tree.parts)
    return prod(tree_size(factor, sizes) for factor in tree.factors)


def leaves(tree: Tree) -> Iterator[int]:
    """Iterate over the atoms of a tree, left to right, with repetitions."""
    if isinstance(tree, int):
        yield tree
        return
    for child in tree.parts if isinstance(tree, Sum) else tree.factors:
        yield from leaves(child)


def locate(tree: Tree, atom: int, sizes: Mapping[int, int] | Sequence[int]) -> tuple[Block, ...]:
    """Find every place of an atom along an axis.

    >>> locate(Sum((0, Product((1, 2)))), 1, [3, 4, 5])
    (Block(offset=3, inner=5, outer=()),)
    """
    return tuple(layout(tree, sizes).get(atom, ()))


def layout(tree: Tree, sizes: Mapping[int, int] | Sequence[int]) -> dict[int, list[Block]]:
    """Find every place of every atom along an axis. Atoms are in order of appearance.

    >>> list(layout(Sum((0, Product((1, 2)))), [3, 4, 5]))
    [0, 1, 2]
    """
    places: dict[int, list[Block]] = {}
    _lay_out(tree, sizes, Block(0), places)
    return places


def _lay_out(
    tree: Tree,
    sizes: Mapping[int, int] | Sequence[int],
    at: Block,
    places: dict[int, list[Block]],
) -> None:
    if isinstance(tree, int):
        places.setdefault(tree, []).append(at)
        return
    if isinstance(tree, Sum):
        offset = at.offset
        for part in tree.parts:
            _lay_out(part, sizes, Block(offset, at.inner, at.outer), places)
            offset += tree_size(part, sizes) * at.inner
        return
    counts = [tree_size(factor, sizes) for factor in tree.factors]
    outer = at.outer
    for i, factor in enumerate(tree.factors):
        inner = at.inner * prod(counts[i + 1 :])
        _lay_out(factor, sizes, Block(at.offset, inner, outer), places)
        if counts[i] > 1:
            outer = (*outer, (counts[i], inner))


class AxisTable:
    """The atoms of one trace, with their equalities, structure and locks."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self._parent: list[int] = []
        self._meaning: dict[int, Tree] = {}
        self._reasons: dict[int, list[str]] = {}
        self._choices: dict[int, list[str]] = {}
        self._resolved: dict[Tree, Tree] = {}  # as long as no atom gets another meaning

    def atom(self, size: int, lock: str | None = None) -> Tree:
        """Make an axis of one new atom. `lock` is a reason why the atom must keep its size."""
        self.size.append(size)
        self._parent.append(len(self._parent))
        if lock is not None:
            self._reasons[len(self.size) - 1] = [lock]
        return len(self.size) - 1

    def reasons(self, atom: int) -> tuple[str, ...]:
        """List the reasons why an atom must keep its size; empty if it may shrink."""
        return tuple(self._reasons.get(self._find(atom), ()))

    def choices(self, atom: int) -> tuple[str, ...]:
        """List the reasons why channels of an atom may be removed but not combined."""
        return tuple(self._choices.get(self._find(atom), ()))

    def measure(self, tree: Tree) -> int:
        return tree_size(tree, self.size)

    def _find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def resolve(self, tree: Tree) -> Tree:
        """Rewrite a tree in its smallest known atoms, in normal form.

        In normal form no Sum contains a Sum, no Product contains a Product, and no factor has
        size 1. A Product does not begin with a Sum: it is distributed over the Sum.
        """
        if isinstance(tree, int):
            tree = self._find(tree)
            if tree not in self._meaning:
                return tree
        if tree not in self._resolved:
            self._resolved[tree] = self._resolve(tree)
        return self._resolved[tree]

    def _resolve(self, tree: Tree) -> Tree:
        if isinstance(tree, int):
            return self.resolve(self._meaning[tree])
        if isinstance(tree, Sum):
            parts: list[Tree] = []
            for part in map(self.resolve, tree.parts):
                if self.measure(part) > 0:
                    parts.extend(part.parts if isinstance(part, Sum) else (part,))
            return parts[0] if len(parts) == 1 else Sum(tuple(parts))
        factors: list[Tree] = []
        for factor in map(self.resolve, tree.factors):
            if self.measure(factor) != 1:
                factors.extend(factor.factors if isinstance(factor, Product) else (factor,))
        if len(factors) == 1:
            return factors[0]
        if factors and isinstance(factors[0], Sum):
            rest = factors[1:]
            return self.resolve(Sum(tuple(Product((p, *rest)) for p in factors[0].parts)))
        return Product(tuple(factors))

    def lock(self, tree: Tree, reason: str) -> None:
        """Lock every atom of an axis, with the reason."""
        self._note(self._reasons, tree, reason)

    def choose(self, tree: Tree, reason: str) -> None:
        """Forbid combining the channels of an axis; single channels may still be removed."""
        self._note(self._choices, tree, reason)

    def _note(self, notes: dict[int, list[str]], tree: Tree, reason: str) -> None:
        for atom in leaves(self.resolve(tree)):
            reasons = notes.setdefault(atom, [])
            if reason not in reasons:
                reasons.append(reason)

    def unify(self, x: Tree, y: Tree) -> bool:
        """State that two axes hold the same channels at the same positions.

        If the two structures do not match, lock both axes and return False. Locking is always
        safe.
        """
        x, y = self.resolve(x), self.resolve(y)
        if x == y:
            return True
        if self.measure(x) == self.measure(y) and self._match(x, y):
            return True
        for side in (x, y):
            self.lock(side, "its structure does not match that of the axis it meets")
        return False

    def _match(self, x: Tree, y: Tree) -> bool:
        if x == y:
            return True
        if isinstance(x, int):
            return self._define(x, y)
        if isinstance(y, int):
            return self._define(y, x)
        if isinstance(x, Product) and isinstance(y, Product):
            return self._match_products(list(x.factors), list(y.factors))
        return self._match_sums(_parts(x), _parts(y))

    def _define(self, atom: int, tree: Tree) -> bool:
        """Define an atom as a tree, and move the atom's locks to the atoms of the tree."""
        if not isinstance(tree, int) and atom in leaves(tree):
            return False
        self._resolved.clear()
        reasons, choices = self._reasons.pop(atom, []), self._choices.pop(atom, [])
        if isinstance(tree, int):
            self._parent[atom] = tree
        else:
            self._meaning[atom] = tree
        for reason in reasons:
            self.lock(tree, reason)
        for reason in choices:
            self.choose(tree, reason)
        return True

    def _match_products(self, xs: list[Tree], ys: list[Tree]) -> bool:
        while xs and ys:
            x, y = self.resolve(xs.pop(0)), self.resolve(ys.pop(0))
            nx, ny = self.measure(x), self.measure(y)
            if nx > ny:
                halves = self.factor(x, (ny, nx // ny)) if nx % ny == 0 else None
                if halves is None:
                    return False
                x, rest = halves
                xs.insert(0, rest)
            elif ny > nx:
                halves = self.factor(y, (nx, ny // nx)) if ny % nx == 0 else None
                if halves is None:
                    return False
                y, rest = halves
                ys.insert(0, rest)
            if not self._match(self.resolve(x), self.resolve(y)):
                return False
        return all(self.measure(tree) == 1 for tree in (*xs, *ys))

    def _match_sums(self, xs: list[Tree], ys: list[Tree]) -> bool:
        while xs and ys:
            x, y = self.resolve(xs.pop(0)), self.resolve(ys.pop(0))
            nx, ny = self.measure(x), self.measure(y)
            if nx > ny:
                x, rest = self.cut(x, ny)
                xs.insert(0, rest)
            elif ny > nx:
                y, rest = self.cut(y, nx)
                ys.insert(0, rest)
            x, y = self.resolve(x), self.resolve(y)
            if self.measure(x) != self.measure(y) or not self._match(x, y):
                return False
        return not xs and not ys

    def cut(self, tree: Tree, at: int) -> tuple[Tree, Tree]:
        """Split an axis in two at a position, and refine atoms if needed.

        A cut inside the inner positions of a factor cannot be expressed. In that case, lock the
        axis and return two new locked axes.
        """
        tree, total = self.resolve(tree), self.measure(tree)
        if at <= 0 or at >= total:
            return (Sum(()), tree) if at <= 0 else (tree, Sum(()))
        if isinstance(tree, int):
            halves = (self.atom(at), self.atom(total - at))
            self._define(tree, Sum(halves))
            return halves
        if isinstance(tree, Sum):
            for i, part in enumerate(tree.parts):
                n = self.measure(part)
                if at < n:
                    left, right = self.cut(part, at)
                    return Sum((*tree.parts[:i], left)), Sum((right, *tree.parts[i + 1 :]))
                at -= n
        assert isinstance(tree, Product)
        inner = prod(self.measure(factor) for factor in tree.factors[1:])
        if at % inner == 0:
            left, right = self.cut(tree.factors[0], at // inner)
            return Product((left, *tree.factors[1:])), Product((right, *tree.factors[1:]))
        reason = "it is cut inside a block of positions that belong together"
        self.lock(tree, reason)
        return self.atom(at, reason), self.atom(total - at, reason)

    def slice(self, tree: Tree, start: int, stop: int) -> Tree:
        """Return the positions of an axis from start to stop."""
        return self.cut(self.cut(tree, stop)[0], start)[1]

    def factor(self, tree: Tree, sizes: Sequence[int]) -> list[Tree] | None:
        """Factor an axis into a row-major product of the given sizes; None if impossible."""
        tree = self.resolve(tree)
        if len(sizes) == 1:
            return [tree]
        if isinstance(tree, int):
            factors = [UNIT if n == 1 else self.atom(n) for n in sizes]
            self._define(tree, self.resolve(Product(tuple(factors))))
            return factors
        if isinstance(tree, Product):
            return self._factor_product(list(tree.factors), sizes)
        return self._factor_sum(tree.parts, sizes)

    def _factor_product(self, factors: list[Tree], sizes: Sequence[int]) -> list[Tree] | None:
        found: list[Tree] = []
        for wanted in sizes:
            taken: list[Tree] = []
            while wanted > 1:
                head = self.resolve(factors.pop(0)) if factors else UNIT
                n = self.measure(head)
                if n > wanted:
                    halves = self.factor(head, (wanted, n // wanted)) if n % wanted == 0 else None
                    if halves is None:
                        return None
                    head, rest = halves
                    factors.insert(0, rest)
                    n = wanted
                if n < 2 or wanted % n:
                    return None
                taken.append(head)
                wanted //= n
            found.append(Product(tuple(taken)))
        return found

    def _factor_sum(self, parts: tuple[Tree, ...], sizes: Sequence[int]) -> list[Tree] | None:
        """Factor each part and unify the inner factors; the parts form the first factor."""
        inner = prod(sizes[1:])
        if any(self.measure(part) % inner for part in parts):
            return None
        split: list[list[Tree]] = []
        for part in parts:
            factors = self.factor(part, (self.measure(part) // inner, *sizes[1:]))
            if factors is None:
                return None
            split.append(factors)
        first = split[0]
        for other in split[1:]:
            for x, y in zip(first[1:], other[1:], strict=True):
                if not self.unify(x, y):
                    return None
        return [Sum(tuple(factors[0] for factors in split)), *first[1:]]


def _parts(tree: Tree) -> list[Tree]:
    return list(tree.parts) if isinstance(tree, Sum) else [tree]
