"""Networks that lie on another device: every method plans as it does on the CPU.

Where there is no GPU, tensors pretend to lie elsewhere and refuse to meet those of the CPU.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from networks import build, covering, outputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import intrafuse
from intrafuse.graph import trace
from intrafuse.methods import Auto, Folding, IntraFusion, Moment, Select
from intrafuse.moments.damage import damage_by_width
from intrafuse.pruning.repair import analytic_repair
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

METHODS = [Select(), IntraFusion(), Folding(), Moment(), Moment(transport="none"), Auto()]
INDEXING = ("aten.index.Tensor", "aten.index_put_.default")  # by indices of the CPU
MAY_MIX = (*INDEXING, "aten.copy_.default", "aten._to_copy.default")


class Away(Tensor):
    """Holds a tensor of the CPU, and says that it lies on the device `meta`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        like = {"dtype": held.dtype, "device": "meta", "strides": held.stride()}
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, **like)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def held(x):
    return x.held if isinstance(x, Away) else x


def compute(func, args, kwargs):
    """Compute on the CPU, and put the result where the device would."""
    name, tensors = str(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = any(isinstance(x, Away) for x in tensors)
    if away and name not in MAY_MIX:
        if any(not isinstance(x, Away) and x.dim() for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name in MAY_MIX:
        away = isinstance(args[0], Away)
    found = func(*tree_map(held, args), **tree_map(held, kwargs))
    if name.endswith("_.default") and isinstance(args[0], Away):
        return args[0]  # in place
    return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, found) if away else found


def planned(name, method, *, away):
    """Merge every group of a network as `plan` does, with its tensors here or away."""
    model, x = build(name)
    graph = trace(model, x)
    weights = Weights.of(graph, model)
    if method.folds_batchnorm:
        fold_norms(weights)
    if away:
        weights = weights.moved(lambda tensor: Away(tensor.clone()))
    context = Context(weights, weights.snapshot(), model, x)
    with Pretending() if away else contextlib.nullcontext():
        damage = damage_by_width(graph.groups, weights)
        for group in graph.groups:
            step = method(group, torch.arange(group.size).float(), group.size // 2, context)
            weights.merge(analytic_repair(step, group, context))
    if away:
        assert all(isinstance(tensor, Away) for tensor in weights.state.values())
    return damage, {k: held(t) for k, t in weights.state.items()}


def test_tensors_that_lie_apart_do_not_meet():
    with pytest.raises(RuntimeError, match="same device"), Pretending():
        Away(torch.ones(2)) + torch.ones(2)


@pytest.mark.parametrize(
    ("name", "method"),
    covering(["chain", "residual", "grouped", "preactivation", "flat", "mlp"], METHODS),
)
def test_plans_are_those_of_the_cpu(name, method):
    damage, state = planned(name, method, away=True)
    same_damage, same = planned(name, method, away=False)
    assert damage.keys() == same_damage.keys() and state.keys() == same.keys()
    for group, curve in damage.items():
        np.testing.assert_allclose(curve, same_damage[group], rtol=1e-6, atol=1e-9)
    for parameter, tensor in state.items():
        torch.testing.assert_close(tensor, same[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("settings", [{}, {"repair": "analytic"}, {"repair": "synthetic"}])
@pytest.mark.parametrize("method", ["select", "folding", "moment", "auto"])
def test_networks_on_a_gpu(method, settings):
    model, x = build("residual")
    model, x = model.cuda(), x.cuda()
    settings = {"channels": 0.5, "scope": "predicted", "method": method, **settings}
    small = intrafuse.prune(model, x, **settings).model
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    assert torch.isfinite(outputs(small, x)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("source", ["synthetic", "calibration"])
@pytest.mark.parametrize("kind", [Moment, Auto])
def test_measured_moments_on_a_gpu(kind, source):
    model, x = build("residual")
    model, x = model.cuda(), x.cuda()
    method = kind(source=source, images=8, steps=2)
    small = intrafuse.prune(model, x, channels=0.5, method=method, data=[x]).model
    assert torch.isfinite(outputs(small, x)).all()
