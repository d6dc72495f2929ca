"""Splitting the data: parts that cover, sizes, shares, seeds, files, and refusals."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intrafuse.study.factorize.recipe import Splits
from intrafuse.study.factorize.splits import read_positions, split, write_positions
from intrafuse.support.errors import IntrafuseError

LABELS = torch.arange(1000) % 10


def members(parts) -> list[set[int]]:
    return [set(part.tolist()) for part in parts]


@given(st.integers(2, 9), st.integers(20, 200), st.integers(0, 5))
def test_disjoint_parts_are_equal_and_cover_everything(folds, total, seed):
    parts = split(Splits(folds=folds), torch.zeros(total, dtype=torch.int64), seed=seed)
    sizes = [len(part) for part in parts]
    assert len(parts) == folds and max(sizes) - min(sizes) <= 1
    assert sorted(i for part in parts for i in part.tolist()) == list(range(total))


@pytest.mark.parametrize("folds", [2, 4, 6])
def test_k_fold_parts_are_all_unions_of_half_the_subsets(folds):
    parts = members(split(Splits(scheme="k-fold", folds=folds), LABELS))
    assert len(parts) == comb(folds, folds // 2) == len(set(map(frozenset, parts)))
    assert all(abs(len(part) - 500) <= folds for part in parts)
    for i in range(1000):  # every image is in as many parts as every other
        assert sum(i in part for part in parts) == comb(folds - 1, folds // 2 - 1)


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_overlapping_parts_share_what_was_asked_for(overlap):
    own = members(split(Splits(folds=4), LABELS))
    parts = members(split(Splits(scheme="overlapping", folds=4, overlap=overlap), LABELS))
    for part, core in zip(parts, own, strict=True):
        assert core <= part
        assert (len(part) - len(core)) / len(part) == pytest.approx(overlap, abs=0.01)


def test_dirichlet_parts_cover_everything_and_are_skewed_by_alpha():
    def skew(alpha: float) -> float:
        parts = split(Splits(scheme="dirichlet", folds=4, alpha=alpha), LABELS, seed=1)
        assert sorted(i for part in parts for i in part.tolist()) == list(range(1000))
        shares = torch.stack([torch.bincount(LABELS[p], minlength=10) for p in parts]) / 100
        return float((shares - 0.25).abs().mean())

    assert skew(0.1) > skew(1.0) > skew(100.0) and skew(100.0) < 0.05


@pytest.mark.parametrize("scheme", ["disjoint", "k-fold", "overlapping", "dirichlet"])
def test_the_seed_alone_decides(scheme):
    splits = Splits(scheme=scheme, folds=2, overlap=0.1 if scheme == "overlapping" else 0)
    first, again, other = (members(split(splits, LABELS, seed=s)) for s in (1, 1, 2))
    assert first == again and first != other


def test_files_give_the_parts(tmp_path):
    write_positions(torch.tensor([4, 2, 9]), tmp_path / "a.npy")
    (tmp_path / "b.txt").write_text("1\n3\n")
    files = (str(tmp_path / "a.npy"), str(tmp_path / "b.txt"))
    parts = split(Splits(scheme="files", files=files), LABELS)
    assert [part.tolist() for part in parts] == [[2, 4, 9], [1, 3]]


@pytest.mark.parametrize(
    ("content", "rule"),
    [("", "no image"), ("1 1", "different"), ("1000", "0..999"), ("-1", "0..999"), ("x", "read")],
)
def test_files_are_checked(content, rule, tmp_path):
    (tmp_path / "a.txt").write_text("0")
    (tmp_path / "b.txt").write_text(content)
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    with pytest.raises(IntrafuseError, match=rule):
        split(Splits(scheme="files", files=files), LABELS)


def test_an_array_file_must_hold_whole_numbers_and_nothing_pickled(tmp_path):
    for name, array in (("floats", np.ones(3)), ("object", np.array([{}], object))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(IntrafuseError, match=r"positions (must|cannot)"):
            read_positions(tmp_path / f"{name}.npy")
    with pytest.raises(IntrafuseError, match="cannot be read"):
        read_positions(tmp_path / "absent.npy")


def test_more_folds_than_images_are_refused_before_they_are_made():
    with pytest.raises(IntrafuseError, match="1000 images"):
        split(Splits(folds=10**12), LABELS)


def test_a_part_without_images_is_refused():
    with pytest.raises(IntrafuseError, match="no image"):
        split(Splits(folds=5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"folds": 1},
        {"scheme": "k-fold", "folds": 3},
        {"scheme": "files"},
        {"files": ("a", "b")},
        {"scheme": "files", "files": ("a",)},
        {"overlap": 1.0},
        {"alpha": 0.0},
        {"overlap": 0.2},
        {"alpha": 0.1},
        {"scheme": "overlapping", "folds": 2, "overlap": 0.6},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        Splits(**wrong)


def test_parts_of_k_fold_are_named_in_order():
    two = members(split(Splits(scheme="k-fold", folds=4), LABELS))
    quarters = [two[0] & two[1], two[0] & two[3], two[1] & two[3], two[2] & two[4]]
    assert [a | b for a, b in combinations(quarters, 2)] == two
