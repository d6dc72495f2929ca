"""Random transformers: pruned by `select` they equal their masked references, or are locked."""

from __future__ import annotations

import torch
from attention_networks import (
    GROUPING,
    MASKS,
    MLPS,
    NORMS,
    PROJECTIONS,
    SCORES,
    TOKENS,
    VIEWS,
    Attention,
    Block,
    Classifier,
    Mlp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import randomise
from reference import mask_channels
from torch import nn

import intrafuse


def random_block(draw, channels: int) -> nn.Module:
    """Draw a block: how attention is written, the norms, the MLP."""
    grouping = draw(st.sampled_from(GROUPING))
    projections = [p for p in PROJECTIONS if grouping == "none" or p in ("separate", "slices")]
    rotary = draw(st.booleans())
    attention = Attention(
        channels,
        heads=draw(st.sampled_from([2, 4])),
        width=draw(st.sampled_from([4, 6] if rotary else [3, 5, 6])),
        projection=draw(st.sampled_from(projections)),
        view=draw(st.sampled_from(VIEWS)),
        scores=draw(st.sampled_from(SCORES)),
        mask=draw(st.sampled_from(MASKS)),
        grouping=grouping,
        rotary=rotary,
        query_norm=draw(st.integers(0, 3)) == 0,
    )
    mlp = Mlp(channels, draw(st.sampled_from([5, 8])), draw(st.sampled_from(MLPS)))
    return Block(attention, mlp, draw(st.sampled_from(NORMS)), channels=channels)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([0.3, 0.5, 0.8]), st.integers(0, 1000))
def test_select_equals_the_masked_reference(data, share, seed):
    channels = data.draw(st.sampled_from([8, 24]))
    blocks = [random_block(data.draw, channels) for _ in range(data.draw(st.integers(1, 2)))]
    norms = data.draw(st.sampled_from(NORMS))
    model = randomise(Classifier(*blocks, channels=channels, norms=norms), seed)
    plan = intrafuse.plan(
        model, TOKENS, channels=share, method="select", importance="random", seed=seed
    )
    assert any("mlp" in group.name for group in plan.graph.groups)
    pruned = plan.apply(model)
    with torch.no_grad():
        expected = mask_channels(model, plan)(TOKENS)
        torch.testing.assert_close(pruned(TOKENS), expected, rtol=1e-6, atol=1e-6)
    for name, tensor in pruned.state_dict().items():
        assert tuple(tensor.shape) == plan.shapes().get(name, tuple(tensor.shape))
