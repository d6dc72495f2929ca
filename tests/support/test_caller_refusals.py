"""What the caller's data, code and modules may not hold: one line, and nothing has changed."""

from __future__ import annotations

import copy
import io
import sys
import threading

import pytest
import torch
from networks import build, covering, outputs, same_state
from torch import nn

import intrafuse
from intrafuse import IntrafuseError, fuse, prune

NAN, INF = float("nan"), float("inf")
MASK = nn.Transformer.generate_square_subsequent_mask


def batches(x, bad, where):
    good = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    wrong, labels = good.clone(), torch.zeros(16)
    wrong.view(-1)[5] = bad
    inputs = {"tensor": wrong, "kwargs": {"x": wrong}, "labels": good}[where]
    first = {"x": good} if where == "kwargs" else good
    labels = torch.full((16, 5), bad) if where == "labels" else None
    return [(first, None), (inputs, labels)]


MEASURED = intrafuse.methods.Moment(source="calibration")
CONSUMERS = {
    "repair": lambda m, x, data: prune(m, x, channels=0.5, repair="batchnorm", data=data),
    "repair of select": lambda m, x, data: prune(
        m, x, channels=0.5, method="select", repair="batchnorm", data=data
    ),
    "calibration": lambda m, x, data: prune(m, x, channels=0.5, method=MEASURED, data=data),
    "activation": lambda m, x, data: prune(m, x, channels=0.5, importance="activation", data=data),
    "chip": lambda m, x, data: prune(m, x, channels=0.5, importance="chip", data=data),
    "taylor": lambda m, x, data: prune(m, x, channels=0.5, importance="taylor", data=data),
    "fuse": lambda m, x, data: fuse([m, copy.deepcopy(m)], x, features="activations", data=data),
    "fuse, repair": lambda m, x, data: fuse(
        [m, copy.deepcopy(m)], x, repair="batchnorm", data=data
    ),
}


@pytest.mark.parametrize(
    ("how", "bad", "where"), covering(CONSUMERS, [NAN, INF], ["tensor", "kwargs", "labels"])
)
def test_data_that_is_not_finite(how, bad, where):
    model, x = build("residual")
    state = copy.deepcopy(model.state_dict())
    if how == "taylor":
        data = batches(x, bad, where)
        labels = torch.zeros(16, 5)
        data = [(inputs, labels if told is None else told) for inputs, told in data]
    else:
        data = batches(x, bad, where)
    with pytest.raises(IntrafuseError, match=r"data must be finite, but batch 2 .*got '(nan|inf)'"):
        CONSUMERS[how](model, x, data)
    assert same_state(model, state)


@pytest.mark.parametrize("how", [how for how in CONSUMERS if how != "fuse"])
@pytest.mark.parametrize("value", [-INF, 3e38])
def test_data_on_which_activations_are_not_finite(how, value):
    """Finite numbers overflow in the network; minus infinity may be meant, as in masks."""
    model, x = build("residual")
    data = [torch.randn(16, *x.shape[1:]), torch.full((16, *x.shape[1:]), value)]
    data = [(batch, torch.zeros(16).long()) for batch in data]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(IntrafuseError, match="must be finite"):
        CONSUMERS[how](model, x, data)
    assert same_state(model, state)


# --- code of models


class Sized(nn.Module):
    """A network whose sizes depend on numbers."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 8), nn.Linear(8, 2), how

    def forward(self, x):
        return self.second(self.how(self.first(x), x.sum(1) > 0))


@pytest.mark.parametrize(
    "how",
    [
        lambda h, chosen: torch.unique(h, dim=0),
        lambda h, chosen: h[chosen],
        lambda h, chosen: h[chosen.nonzero()[:, 0]].view(-1, 2, 4).flatten(1),
        lambda h, chosen: h.repeat_interleave(chosen.long(), 0),
        lambda h, chosen: torch.masked_select(h, chosen[:, None]).view(-1, 8),
        lambda h, chosen: h[: int(chosen.sum())],
    ],
)
def test_sizes_that_depend_on_numbers(how):
    with pytest.raises(IntrafuseError, match=r"depend.*\(at .*test_caller_refusals.py:\d+") as info:
        prune(Sized(how), torch.randn(4, 4), channels=0.5)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("no"), StopIteration(), Exception()])
@pytest.mark.parametrize("exporting", [True, False])
def test_code_that_ends_the_program_is_refused(error, exporting):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("mlp")[0]

        def forward(self, x):
            if torch.compiler.is_exporting() == exporting:
                raise error
            return self.net(x)

    x = build("mlp")[1]
    ended = "ended the program" if isinstance(error, SystemExit) else type(error).__name__
    with pytest.raises(IntrafuseError, match=ended if exporting else type(error).__name__):
        prune(Ends(), x, channels=0.5, importance="activation", data=[x])
    if not exporting:
        with pytest.raises(IntrafuseError):
            prune(Ends(), x, channels=0.5, repair="batchnorm", data=[x])


@pytest.mark.parametrize("mask", ["tgt_mask", "src_mask", "encoder", "decoder", "inside"])
def test_masks_of_transformers_need_no_hint(mask):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(x, MASK(x.shape[1])))

    torch.manual_seed(0)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    whole = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    model, inputs = {
        "tgt_mask": (whole, {"src": source, "tgt": target, "tgt_mask": MASK(4)}),
        "src_mask": (whole, {"src": source, "tgt": target, "src_mask": MASK(5)}),
        "encoder": (Inside().encoder, (source, MASK(5))),
        "decoder": (nn.TransformerDecoder(decoder, 2), (target, source, MASK(4))),
        "inside": (Inside(), source),
    }[mask]
    plan = intrafuse.plan(model.eval(), inputs, channels=0.5, method="select")
    assert plan.maps and intrafuse.verify(model, plan).relative < 1e-5
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- modules


class Holder:
    def __init__(self, held):
        self.held = held


@pytest.mark.parametrize("held", [threading.Lock(), threading.RLock(), io.StringIO(), sys])
@pytest.mark.parametrize("where", [lambda held: held, Holder, lambda held: {"x": [held]}])
def test_what_two_networks_may_use_is_shared(held, where):
    model, x = build("mlp")
    model[2].held = where(held)
    small = prune(model, x, channels=0.5).model
    found = small[2].held
    found = found.held if isinstance(found, Holder) else found
    assert (found["x"][0] if isinstance(found, dict) else found) is held


@pytest.mark.parametrize("where", [lambda held: held, Holder, lambda held: {"x": [held]}])
def test_what_cannot_be_copied_is_named(where):
    model, x = build("mlp")
    held = (i for i in range(3))
    model[2].held = where(held)
    with pytest.raises(IntrafuseError, match=r"cannot be copied: .*generator.* \(at 2\.held\)"):
        prune(model, x, channels=0.5)
    assert next(held) == 0  # nobody took it


def test_eight_bits_are_too_few():
    model, x = build("mlp")
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight.float())
    with pytest.raises(IntrafuseError, match=r"16 bits or more \(at 0\.weight\).*float8"):
        prune(model, x, channels=0.5)


@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 3, 4, 6]])
def test_tensors_without_numbers(layers):
    model, x = build("mlp")
    for layer in layers:
        model[layer].to("meta")
    given = x.to("meta") if len(layers) > 1 else x
    message = rf"meta device holds no numbers \(at {layers[0]}\."
    with pytest.raises(IntrafuseError, match=message):
        prune(model, given, channels=0.5)


@pytest.mark.parametrize("method", ["select", "intra-fusion", "folding", "moment", "auto"])
@pytest.mark.parametrize("layers", [[0], [0, 2, 4]])
def test_large_weights_work_or_are_refused(method, layers):
    """Outputs of one such layer are finite; those of three are not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        for layer in layers:
            model[layer].weight *= 1e30
    x = torch.randn(4, 6)
    try:
        small = prune(model, x, channels=0.5, method=method).model
    except IntrafuseError as error:
        assert method in ("moment", "auto") and "finite" in str(error)
    else:
        assert all(p.isfinite().all() for p in small.parameters())
        assert len(layers) > 1 or outputs(small, x).isfinite().all()


# --- budgets


def test_a_budget_out_of_reach_says_what_must_stay():
    with pytest.raises(
        IntrafuseError, match=r"at most 0\.0000 .*keep their size: 0 \(model output\)"
    ):
        prune(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), channels=0.5)
