"""Calls from several threads, and under other settings of PyTorch: results and state stay."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from networks import build, same_state
from torch import nn

import intrafuse
from intrafuse import fuse, prune, synthesise


def process_state(model):
    """List what belongs to the process, and the model's own flags."""
    return (
        list(warnings.filters),
        warnings.showwarning,
        logging.getLogger("torch").level,
        torch.backends.mha.get_fastpath_enabled(),
        (sys.stdout, sys.stderr),
        (torch.get_default_dtype(), torch.get_default_device()),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        torch.get_rng_state().tolist(),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(p.requires_grad, p.grad, p.is_leaf) for p in model.parameters()],
    )


def settings(x):
    data = [(torch.randn(8, *x.shape[1:]), torch.zeros(8).long())]
    return [
        {"method": "select"},
        {"method": "intra-fusion"},
        {"method": "moment", "data": data},
        {"importance": "taylor", "data": data},
        {"repair": "batchnorm", "data": data},
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_threads_prune_at_once(shared):
    model, x = build("mlp")
    model.train()
    asked = settings(x) * 2
    expected = [prune(model, x, channels=0.5, **some).model.state_dict() for some in asked[:5]] * 2
    models = [model if shared else build("mlp")[0].train() for _ in asked]
    before = process_state(model)
    start = threading.Barrier(len(asked))

    def one(net, some):
        start.wait()
        return prune(net, x, channels=0.5, **some).model

    with ThreadPoolExecutor(len(asked)) as pool:
        small = list(pool.map(one, models, asked))
    assert process_state(model) == before
    for net, state in zip(small, expected, strict=True):
        assert net.training and same_state(net, state)


def test_threads_run_a_model_while_its_hooks_are_another_s():
    """Measuring in one thread adds nothing to what another thread measures."""
    model, x = build("residual")
    data = [torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0))]

    def once(_=None):
        given = {"importance": "activation", "data": data}
        return prune(model, x, channels=0.5, method="moment", **given).model.state_dict()

    alone = once()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(once, range(4)):
            assert all(torch.equal(found[name], alone[name]) for name in alone)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
}
OTHER = build("residual", 1)[0]
CALLS = {
    "prune": lambda net, x, data: prune(net, x, channels=0.5).model,
    "moment": lambda net, x, data: prune(net, x, channels=0.5, method="moment").model,
    "auto": lambda net, x, data: prune(net, x, channels=0.5, method="auto").model,
    "predicted": lambda net, x, data: prune(net, x, channels=0.5, scope="predicted").model,
    "calibration": lambda net, x, data: (
        prune(net, x, channels=0.5, method="moment", data=data).model
    ),
    "taylor": lambda net, x, data: (
        prune(net, x, channels=0.5, importance="taylor", data=data).model
    ),
    "chip": lambda net, x, data: prune(net, x, channels=0.5, importance="chip", data=data).model,
    "synflow": lambda net, x, data: prune(net, x, channels=0.5, importance="synflow").model,
    "batchnorm": lambda net, x, data: (
        prune(net, x, channels=0.5, repair="batchnorm", data=data).model
    ),
    "plan and apply": lambda net, x, data: intrafuse.plan(net, x, channels=0.5).apply(net),
    "fold": lambda net, x, data: intrafuse.fold_batchnorm(net, x),
    "fuse": lambda net, x, data: fuse([net, OTHER], x).model,
    "inputs": lambda net, x, data: nn.ParameterList(synthesise(net, x, images=8, steps=3)),
}


EVERY = ("autocast", "inference mode")  # under these every call, under the others some
SOME = ("moment", "fuse")
STATES = [(around, call) for around in AROUND for call in (CALLS if around in EVERY else SOME)]
GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(16, *build("residual")[1].shape[1:], generator=GENERATOR), torch.arange(16) % 3)
]


@cache
def plainly_called(call):
    return CALLS[call](*build("residual"), DATA)


@pytest.mark.parametrize(("around", "call"), STATES)
def test_settings_of_pytorch_change_no_result(around, call):
    (model, x), data = build("residual"), DATA
    expected = plainly_called(call)
    with AROUND[around]():
        before = process_state(model)
        found = CALLS[call](model, x, data)
        assert process_state(model) == before
    for name, parameter in found.named_parameters():
        same = expected.get_parameter(name)
        assert parameter.is_leaf and not parameter.is_inference(), name
        assert parameter.requires_grad == same.requires_grad, name
        torch.testing.assert_close(parameter, same, rtol=0, atol=0)
    for name, buffer in found.named_buffers():
        assert not buffer.is_inference()
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=0, atol=0)
    if call != "inputs":
        found.train()(x).sum().backward()
        assert all(p.grad is not None for p in found.parameters())


@pytest.mark.parametrize("method", ["select", "moment"])
def test_code_of_a_model_runs_with_the_defaults_of_its_caller(method):
    class Exacting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            assert torch.zeros(1).dtype == torch.float64
            return self.third(self.second(self.first(x + torch.zeros(4)).relu()).relu())

    with default_dtype(torch.float64):
        model, data = Exacting(), [torch.randn(16, 4)]
        small = prune(model, data[0], channels=0.4, method=method, data=data).model
        assert small(data[0]).dtype == torch.float64
