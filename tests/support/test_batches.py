"""The user's data: every form of a batch, and what is no data."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from intrafuse import IntrafuseError
from intrafuse.support.batches import batches, map_tensors, tensors_of

MODEL = nn.Linear(3, 1)
X, LABELS = torch.arange(12.0).reshape(4, 3), torch.arange(4)


def read(data, **settings):
    return list(batches(data, MODEL, purpose="a test", **settings))


@pytest.mark.parametrize(
    ("batch", "inputs", "labels"),
    [
        (X, X, None),
        ((X,), X, None),
        ([X], X, None),
        ((X, LABELS), X, LABELS),
        ([X, LABELS], X, LABELS),
        ((X, None), X, None),
        ({"input": X}, {"input": X}, None),
        (({"input": X}, LABELS), {"input": X}, LABELS),
        (((X, X), LABELS), (X, X), LABELS),
        (((X, X),), (X, X), None),
    ],
)
def test_every_form_of_a_batch(batch, inputs, labels):
    ((found, told),) = read([batch])

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(torch.equal, a, b))
        return torch.equal(a, b)

    assert type(found) is type(inputs) and same(found, inputs)
    assert told is labels or torch.equal(told, labels)


def test_a_loader_may_be_read_again_and_again():
    data = DataLoader(TensorDataset(X, LABELS), batch_size=2)
    for _ in range(2):
        found = read(data)
        torch.testing.assert_close(torch.cat([x for x, _ in found]), X)
        assert [labels.tolist() for _, labels in found] == [[0, 1], [2, 3]]


def test_a_limit_reads_no_further():
    seen = []

    def data():
        for i in range(9):
            seen.append(i)
            yield X

    assert len(read(data(), limit=3)) == 3 and seen == [0, 1, 2]
    assert len(read([X, X], limit=5)) == 2


@pytest.mark.parametrize("data", [X, {"input": X}, "digits", 3, nn.Linear(1, 1)])
def test_what_is_no_data(data):
    with pytest.raises(IntrafuseError, match=r"iterable of batches; got '\w+'.*--data SPEC"):
        read(data)


def test_no_data_names_its_purpose():
    with pytest.raises(IntrafuseError, match=r"a test needs data.*--data SPEC") as info:
        read(None)
    assert info.value.usage


@pytest.mark.parametrize("data", [[], (), iter([])])
def test_empty_data(data):
    with pytest.raises(IntrafuseError, match=r"data gave no batch.*not an iterator"):
        read(data)


@pytest.mark.parametrize("batch", [(X, LABELS, X), [X] * 4, ()])
def test_a_batch_of_other_parts(batch):
    with pytest.raises(IntrafuseError, match=rf"\(inputs, labels\); got '{len(batch)} parts'"):
        read([batch])


def test_tensors_in_nested_values():
    found = map_tensors(lambda t: t + 1, {"a": [X, ("b", X)], "c": None})
    assert found["c"] is None and found["a"][1][0] == "b"
    assert torch.equal(found["a"][0], X + 1) and torch.equal(found["a"][1][1], X + 1)


class Pair(NamedTuple):
    first: object
    second: object


@dataclass
class Record:
    first: object
    second: object


class Numbered(list):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda *parts: Pair(*parts),
        lambda *parts: Record(*parts),
        lambda *parts: Numbered(parts),
        lambda *parts: deque(parts),
        lambda *parts: OrderedDict(zip("ab", parts, strict=True)),
        lambda *parts: UserDict(zip("ab", parts, strict=True)),
    ],
)
def test_tensors_in_trees_of_every_type(make):
    tree = make(X, {"inner": make("text", X + 1)})
    assert [t.tolist() for t in tensors_of(tree)] == [X.tolist(), (X + 1).tolist()]
    found = map_tensors(lambda t: -t, tree)
    assert [t.tolist() for t in tensors_of(found)] == [(-X).tolist(), (-X - 1).tolist()]
    assert type(found) is (dict if isinstance(tree, UserDict) else type(tree))


def test_a_model_without_parameters_takes_data_as_it_is():
    ((found, _),) = batches([X], nn.ReLU(), purpose="a test")
    assert torch.equal(found, X)
