"""The caller's model: after every call it is as it was, whatever its code keeps or counts."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import intrafuse
from intrafuse import IntrafuseError, fuse, verify  # some libraries draw at import
from intrafuse.allocation.timing import latency
from intrafuse.study.evaluate.memory import peak_memory

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Cache:
    """A plain object that code of a model keeps things in."""

    __slots__ = ("__dict__", "shape")

    def __init__(self):
        self.seen, self.shape, self.outputs = 0, None, []


class Keeps(nn.Module):
    """A network that keeps what it computes in every place that a module has."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.register_buffer("mask", torch.ones(8, 1, 1))
        self.last, self.calls, self.shapes = None, 0, [()]
        self.found = {"by": OrderedDict(first=None), "order": deque(maxlen=3)}
        self.cache = Cache()
        self.inside = SimpleNamespace(cache=(Cache(), {1}))

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        self.last, self.calls = h, self.calls + 1
        self.shapes.append(tuple(h.shape))
        self.found["by"]["first"], self.found["new"] = h, h.mean()
        self.found["by"].move_to_end("first")
        self.found["order"].append(h)
        self.cache.shape, self.cache.seen = h.shape, self.cache.seen + 1
        self.cache.outputs.append(h)
        self.cache.fresh = h
        self.inside.cache[0].outputs.append(h)
        self.inside.cache[1].add(len(self.shapes))
        self.second.note = h
        self.mask.note = h
        h = self.second(h).relu()
        return self.head(h.mean((2, 3)))


class Draws(Keeps):
    """It also draws random numbers, and counts in tensors and arrays."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.total, self.histogram = torch.zeros(2), np.zeros(2)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        if not torch.compiler.is_exporting():  # which knows none of this
            self.count += 1
            self.total.data += 1
            self.total.data = self.total.data.clone()
            self.histogram += 1
            self.mask = self.mask.clone()
            x = x + torch.rand(1, generator=self.generator) * random.random() * np.random.rand()
            x = x * torch.rand(1)
        return super().forward(x)


def tree(value, seen=None):
    """Describe all that an object holds: what is held where, and what tensors hold."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        own = (id(value), value.tolist(), value.requires_grad, id(value.grad))
        return (own, tree(vars(value), seen))
    if isinstance(value, np.ndarray):
        return (id(value), value.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, int | float | str | torch.Size):
        return value
    if id(value) in seen or value is None:
        return id(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return [(tree(k, seen), tree(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | deque):
        return (id(value), [tree(item, seen) for item in value])
    names = [name for name in getattr(type(value), "__slots__", ()) if name != "__dict__"]
    held = [*(getattr(value, name, None) for name in names), getattr(value, "__dict__", None)]
    return (id(value), type(value), [tree(part, seen) for part in held])


def differing(a, b, path=""):
    """List places where two descriptions differ, for the message of a failed test."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differing(x, y, f"{path}.{i}")
        ]
    return [] if a == b else [f"{path}: {str(a)[:80]} {str(b)[:80]}"]


def everything(model):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return tree(model), state, [hash(p) for p in model.parameters()]


BATCHES = [(X, torch.tensor([0, 1, 0, 1]))] * 2
TRACING = {
    "trace": lambda m: intrafuse.trace(m, X),
    "plan": lambda m: intrafuse.plan(m, X, channels=0.5),
    "prune": lambda m: intrafuse.prune(m, X, channels=0.5),
    "fold": lambda m: intrafuse.fold_batchnorm(m, X),
    "apply": lambda m: intrafuse.plan(m, X, channels=0.5).apply(m),
    "auto": lambda m: intrafuse.prune(m, X, channels=0.5, method="auto"),
}
RUNNING = {
    "select": lambda m: intrafuse.prune(m, X, channels=0.5, method="select"),
    "verify": lambda m: verify(m, intrafuse.plan(m, X, channels=0.5, method="select")),
    "calibration": lambda m: intrafuse.prune(m, X, channels=0.5, method="moment", data=BATCHES),
    "batchnorm": lambda m: intrafuse.prune(m, X, channels=0.5, repair="batchnorm", data=BATCHES),
    "synthetic": lambda m: intrafuse.prune(m, X, channels=0.5, repair="synthetic"),
    "taylor": lambda m: intrafuse.prune(m, X, channels=0.5, importance="taylor", data=BATCHES),
    "chip": lambda m: intrafuse.prune(m, X, channels=0.5, importance="chip", data=BATCHES),
    "synflow": lambda m: intrafuse.prune(m, X, channels=0.5, importance="synflow"),
    "latency": lambda m: latency(m, X, runs=4),
    "memory": lambda m: peak_memory(m, X),
    "fuse": lambda m: fuse(
        [m, copy.deepcopy(m)], X, features="activations", data=BATCHES, repair="batchnorm"
    ),
}


@pytest.mark.parametrize("how", [*TRACING, *RUNNING])
def test_a_model_that_keeps_what_it_computes_is_as_it_was(how):
    torch.manual_seed(0)
    model = Keeps().train()
    before = everything(model)
    {**TRACING, **RUNNING}[how](model)
    assert not differing(everything(model), before)
    copy.deepcopy(model)


@pytest.mark.parametrize("how", RUNNING)
def test_a_model_that_counts_and_draws_is_as_it_was(how):
    torch.manual_seed(0)
    model = Draws().train()
    before = everything(model)
    RUNNING[how](model)
    assert not differing(everything(model), before)


@pytest.mark.parametrize("kind", [Keeps, Draws])
@pytest.mark.parametrize(
    "settings",
    [{"params": 0.99}, {"channels": 0.5, "exclude": ["nothing"]}, {"channels": 2}],
)
def test_a_model_is_as_it_was_after_a_refusal(kind, settings):
    model = kind().train()
    before = everything(model)
    with pytest.raises(IntrafuseError):
        intrafuse.prune(model, X, **settings)
    assert not differing(everything(model), before)


def test_an_interrupt_passes_and_leaves_the_model_as_it_was():
    class Interrupted(Keeps):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt

    model = Interrupted().train()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        intrafuse.trace(model, X)
    assert not differing(everything(model), before)


def test_inputs_that_a_model_computes_in_are_as_they_were():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.net(x.mul_(2))

    torch.manual_seed(0)
    model, x = Scales(), torch.randn(16, 4)
    given = x.clone()
    for settings in ({"method": "moment"}, {"importance": "activation"}, {"importance": "taylor"}):
        data = [(x, torch.zeros(16).long())]
        intrafuse.prune(model, x, channels=0.5, data=data, **settings)
        assert torch.equal(x, given)
    latency(model, x, runs=4)
    assert torch.equal(x, given)
