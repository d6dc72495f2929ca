"""Random architectures: pruned by `select` they equal their masked references, or are locked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, randomise
from reference import mask_readers, mask_writers

import intrafuse
from intrafuse.support.errors import IntrafuseError


@contextmanager
def another_where_all_is_locked() -> Iterator[None]:
    """Draw another network where no channel may go; hypothesis complains if these are many."""
    try:
        yield
    except IntrafuseError as error:
        if "at most 0.0000 can be removed" not in str(error):
            raise AssertionError(f"a network of supported layers was refused: {error}") from error
        reject()


@settings(max_examples=60)
@given(st.data(), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 1000))
def test_select_equals_the_masked_references(data, share, seed):
    model = randomise(RandomNetwork(data.draw), seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    how = {"method": "select", "importance": "random", "seed": seed}
    with another_where_all_is_locked():
        plan = intrafuse.plan(model, x, channels=share, **how)
    pruned = plan.apply(model)
    with torch.no_grad():
        found = pruned(x)
        torch.testing.assert_close(found, mask_readers(model, plan)(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, mask_writers(model, plan)(x), rtol=1e-6, atol=1e-6)
    for name, tensor in pruned.state_dict().items():
        assert tuple(tensor.shape) == plan.shapes()[name]
    for group in plan.graph.groups:
        assert plan.widths[group.name] == max(1, int(group.size * (1 - share) + 1e-9))


@settings(max_examples=12)
@given(st.data(), st.integers(0, 1000))
def test_every_method_runs_on_random_networks(data, seed):
    model = randomise(RandomNetwork(data.draw), seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    for method in ("intra-fusion", "folding"):
        with another_where_all_is_locked():
            pruned = intrafuse.prune(model, x, channels=0.5, method=method).model
        assert torch.isfinite(pruned(x)).all()
