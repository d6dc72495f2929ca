"""The algebra of symbolic axes: layout, matching, cutting, factoring, locking."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intrafuse.graph.axes import UNIT, AxisTable, Product, Sum, leaves, locate, tree_size
from intrafuse.graph.blocks import positions


def labels(tree, sizes, prefix=()):
    """List, position by position, the path of (atom, channel) that a tree lays out: the oracle."""
    if isinstance(tree, int):
        return [(*prefix, (tree, c)) for c in range(sizes[tree])]
    if isinstance(tree, Sum):
        return [label for part in tree.parts for label in labels(part, sizes, prefix)]
    rows = [prefix]
    for factor in tree.factors:
        rows = [label for row in rows for label in labels(factor, sizes, row)]
    return rows


@st.composite
def trees(draw, atoms=4, depth=2):
    if depth == 0 or draw(st.booleans()):
        return draw(st.integers(0, atoms - 1))
    children = tuple(draw(st.lists(trees(atoms, depth - 1), min_size=1, max_size=3)))
    return draw(st.sampled_from([Sum, Product]))(children)


SIZES = [2, 3, 1, 4]


@given(trees())
def test_locate_finds_the_positions_of_every_channel(tree):
    found = labels(tree, SIZES)
    assert tree_size(tree, SIZES) == len(found)
    for atom in set(leaves(tree)):
        where = positions(locate(tree, atom, SIZES), SIZES[atom])
        for channel, row in enumerate(where):
            wanted = [
                p for p, label in enumerate(found) for item in label if item == (atom, channel)
            ]
            assert sorted(row) == sorted(wanted)


@given(trees())
def test_resolving_keeps_the_layout(tree):
    table = AxisTable()
    for size in SIZES:
        table.atom(size)
    resolved = table.resolve(tree)

    def content(t):  # a size of one holds no information
        return [[item for item in label if SIZES[item[0]] > 1] for label in labels(t, SIZES)]

    assert content(resolved) == content(tree)


def test_two_atoms_become_one():
    table = AxisTable()
    a, b = table.atom(4), table.atom(4, "locked")
    assert table.unify(a, b)
    assert table.resolve(a) == table.resolve(b)
    assert table.reasons(a) == ("locked",)


def test_an_atom_takes_the_structure_it_meets():
    table = AxisTable()
    a, b, whole = table.atom(4), table.atom(3), table.atom(7)
    table.unify(whole, Sum((a, b)))
    assert table.resolve(whole) == Sum((a, b))


def test_sums_with_other_boundaries_are_cut():
    table = AxisTable()
    a, b, c, d = table.atom(5), table.atom(3), table.atom(4), table.atom(4)
    assert table.unify(Sum((a, b)), Sum((c, d)))
    left, right = table.resolve(Sum((a, b))), table.resolve(Sum((c, d)))
    assert left == right
    assert [table.measure(part) for part in left.parts] == [4, 1, 3]


def test_products_with_other_factors_are_refined():
    table = AxisTable()
    a, b, c, d = table.atom(6), table.atom(4), table.atom(2), table.atom(12)
    assert table.unify(Product((a, b)), Product((c, d)))
    left = table.resolve(Product((a, b)))
    assert left == table.resolve(Product((c, d)))
    assert [table.measure(factor) for factor in left.factors] == [2, 3, 4]


def test_what_does_not_match_is_locked_on_both_sides():
    table = AxisTable()
    a, b, c, d = table.atom(6), table.atom(4), table.atom(4), table.atom(6)
    assert not table.unify(Product((a, b)), Product((c, d)))
    assert all(table.reasons(atom) for t in (a, b, c, d) for atom in leaves(table.resolve(t)))


def test_sizes_that_differ_are_locked():
    table = AxisTable()
    a, b = table.atom(6), table.atom(4)
    assert not table.unify(a, b)
    assert table.reasons(a) and table.reasons(b)


def test_packed_heads_match_their_flat_form():
    """A packed projection is query, key and value; its view is 3 x heads x width."""
    table = AxisTable()
    q, k, v = (table.atom(12) for _ in range(3))
    three, heads, width = table.factor(Sum((q, k, v)), (3, 4, 3))
    assert table.measure(three) == 3
    assert table.resolve(q) == table.resolve(k) == table.resolve(Product((heads, width)))


@pytest.mark.parametrize("at", [0, 1, 3, 7, 8])
def test_a_cut_gives_both_parts(at):
    table = AxisTable()
    tree = Sum((table.atom(3), table.atom(5)))
    left, right = table.cut(tree, at)
    assert (table.measure(left), table.measure(right)) == (at, 8 - at)
    assert table.resolve(Sum((left, right))) == table.resolve(tree)


def test_a_cut_between_channels_of_a_block_refines_the_channels():
    table = AxisTable()
    c, hw = table.atom(4), table.atom(9, "spatial")
    left, _ = table.cut(Product((c, hw)), 9)
    assert table.measure(left) == 9 and not table.reasons(next(leaves(table.resolve(c))))


def test_a_cut_inside_a_block_locks():
    table = AxisTable()
    c, hw = table.atom(4), table.atom(9)
    left, right = table.cut(Product((c, hw)), 5)
    assert (table.measure(left), table.measure(right)) == (5, 31)
    assert table.reasons(c) and table.reasons(hw)


def test_locks_pass_to_finer_atoms():
    table = AxisTable()
    a = table.atom(6, "model output")
    table.factor(a, (2, 3))
    assert all(table.reasons(atom) == ("model output",) for atom in leaves(table.resolve(a)))


def test_a_single_position_has_no_atoms():
    assert list(leaves(UNIT)) == [] and tree_size(UNIT, []) == 1


@given(trees(), st.data())
def test_factoring_keeps_the_number_of_positions(tree, data):
    table = AxisTable()
    for size in SIZES:
        table.atom(size)
    total = table.measure(table.resolve(tree))
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    first = data.draw(st.sampled_from(divisors))
    factors = table.factor(tree, (first, total // first))
    if factors is not None:
        assert [table.measure(f) for f in factors] == [first, total // first]
        assert table.measure(tree) == total == np.prod([table.measure(f) for f in factors])
