"""Synthetic inputs: known statistics, an untouched model, seeds, shapes, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
from networks import NETWORKS, build, same_state
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import intrafuse
from intrafuse.methods import Moment
from intrafuse.moments.synthetic import dead_leaves, synthesise
from intrafuse.support.errors import IntrafuseError


def plausible(name: str = "chain", seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """Build a small network whose batch norms remember statistics that some data has."""
    model, x = build(name, seed)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(256, *x.shape[1:], generator=generator).cumsum(-1)
    model.train()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(data)
    return model.eval(), x


def divergence(model: nn.Module, data: list[torch.Tensor]) -> float:
    """Average, over norms and channels, how far statistics are from the running ones (KL)."""
    found = []

    def measure(norm: _BatchNorm, received: tuple) -> None:
        z = received[0].movedim(1, 0).flatten(1)
        m, v = norm.running_mean, norm.running_var
        ratio = z.var(1, correction=0) / v
        found.append(0.5 * ((z.mean(1) - m) ** 2 / v + ratio - 1 - ratio.log()).mean())

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model(torch.cat(data))
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())


def input_norm(channels: int = 3, dims: int = 2) -> nn.Module:
    """Make a network whose batch norm stands on the input, with statistics that look trained."""
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    norm = kind(channels)
    norm.running_mean.copy_(torch.linspace(-1, 2, channels))
    norm.running_var.copy_(torch.linspace(0.5, 3, channels))
    return nn.Sequential(norm, nn.ReLU()).eval()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 12), (1, 3, 6, 5), (2, 3, 2, 4, 3)])
def test_inputs_take_the_statistics_of_a_norm_on_the_input(shape):
    model = input_norm(3, len(shape) - 2)
    (batch,) = synthesise(model, torch.zeros(shape), images=32, steps=150)
    assert batch.shape == (32, *shape[1:])
    lines = batch.movedim(1, 0).flatten(1)
    torch.testing.assert_close(lines.mean(1), model[0].running_mean, rtol=0, atol=0.02)
    torch.testing.assert_close(lines.var(1, correction=0), model[0].running_var, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["chain", "residual", "preactivation", "conv1d", "conv3d", "mlp"])
def test_statistics_match_far_better_than_those_of_noise(name):
    model, x = plausible(name)
    noise = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    found = synthesise(model, x, images=64, steps=80)
    assert divergence(model, found) < 0.1 * divergence(model, [noise])


def test_more_steps_match_better():
    model, x = plausible()
    few, many = (synthesise(model, x, images=16, steps=steps) for steps in (5, 60))
    assert divergence(model, many) < 0.5 * divergence(model, few)


def test_a_channel_without_spread_is_matched():
    model = input_norm()
    model[0].running_var[1] = 0
    (batch,) = synthesise(model, torch.zeros(1, 3, 4, 4), images=16, steps=200)
    assert batch.isfinite().all()
    assert float(batch[:, 1].var()) < 0.01
    torch.testing.assert_close(batch[:, 1].mean(), model[0].running_mean[1], rtol=0, atol=0.02)


def test_a_norm_that_is_called_twice_matches_the_average_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.norm(x + 4)

    (batch,) = synthesise(Twice(), torch.zeros(1, 2), images=32, steps=150)
    torch.testing.assert_close(batch.mean(0), torch.full((2,), -2.0), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_stays_as_it_was(name):
    model, x = build(name)
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        pytest.skip("no batch norm")
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    synthesise(model, x, images=5, steps=2, batch_size=3)
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    for i, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) if i % 2 == 0 else bool((parameter.grad == i).all())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_restored_after_an_exception():
    model, x = build("chain")
    model.train()

    def stop(done: int, _total: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt):
        synthesise(model, x, images=4, steps=3, progress=stop)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_seeds_decide_and_the_global_generator_stays():
    model, x = build("chain")
    state = torch.get_rng_state()
    torch.manual_seed(5)
    first = synthesise(model, x, images=6, steps=3, batch_size=4)
    torch.manual_seed(6)
    seeded = torch.get_rng_state()
    again = synthesise(model, x * 7, images=6, steps=3, batch_size=4)
    other = synthesise(model, x, images=6, steps=3, batch_size=4, seed=1)
    assert torch.equal(torch.get_rng_state(), seeded)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("images, sizes", [(1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_batches_are_of_even_size(images, sizes):
    model, x = build("chain")
    found = synthesise(model, x, images=images, steps=1, batch_size=4)
    assert [len(batch) for batch in found] == sizes
    assert not any(batch.requires_grad for batch in found)


def test_progress_counts_steps():
    model, x = build("chain")
    calls = []
    synthesise(model, x, images=6, steps=3, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_have_the_type_of_the_model(dtype):
    model, x = build("chain")
    (batch,) = synthesise(model.to(dtype), x, images=4, steps=2)
    assert batch.dtype == dtype and batch.isfinite().all()


def test_example_inputs_may_be_a_tuple_or_a_mapping():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))

        def forward(self, *, pixels):
            return self.body(pixels)

    model = Named()
    x = torch.zeros(1, 8)
    (plain,) = synthesise(model.body, x, images=4, steps=2)
    (packed,) = synthesise(model.body, (x,), images=4, steps=2)
    (named,) = synthesise(model, {"pixels": x}, images=4, steps=2)
    assert torch.equal(plain, packed) and torch.equal(plain, named)


def test_gradients_are_found_where_the_caller_switched_them_off():
    model, x = build("chain")
    with torch.no_grad():
        quiet = synthesise(model, x, images=4, steps=2)
    assert torch.equal(quiet[0], synthesise(model, x, images=4, steps=2)[0])


def test_a_model_that_changes_what_entered_a_norm_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.norm(x)
            return x.mul_(0).add_(y)

    (batch,) = synthesise(InPlace(), torch.zeros(1, 2), images=32, steps=100)
    torch.testing.assert_close(batch.var(0, correction=0), torch.ones(2), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["chain", "residual", "mlp"])
def test_pruning_takes_them_as_data(name):
    model, x = build(name)
    data = synthesise(model, x, images=8, steps=2, batch_size=4)
    method = Moment(source="calibration")
    pruned = intrafuse.prune(model, x, channels=0.5, method=method, data=data, repair="batchnorm")
    assert pruned.model(x).isfinite().all()


def test_leaves_have_flat_faces_and_edges():
    pictures = dead_leaves((512, 3, 32, 32), torch.Generator().manual_seed(0))
    assert float(pictures.mean()) == pytest.approx(0, abs=0.05)
    assert float(pictures.std()) == pytest.approx(1, abs=0.05)
    steps = pictures.diff(dim=-1)
    assert float((steps == 0).float().mean()) > 0.5
    assert float(steps.pow(4).mean() / steps.square().mean() ** 2) > 6  # edges; 3 without
    colours = pictures.movedim(1, 0).flatten(1).corrcoef()
    assert float(colours[0, 1]) == pytest.approx(0.85**2, abs=0.05)


def test_leaves_without_space_are_noise():
    noise = dead_leaves((4000, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.T.cov(), torch.eye(3), rtol=0, atol=0.08)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 3, 1), (3, 2, 1, 5), (1, 2, 3, 1, 2)])
def test_narrow_inputs(shape):
    model = input_norm(shape[1], len(shape) - 2)
    (batch,) = synthesise(model, torch.zeros(shape), images=4, steps=2)
    assert batch.shape == (4, *shape[1:]) and batch.isfinite().all()


@pytest.mark.parametrize("setting", ["images", "steps", "batch_size", "learning_rate"])
def test_settings_out_of_range_name_themselves(setting):
    model, x = build("chain")
    for value in (0, -3):
        with pytest.raises(IntrafuseError, match=rf"{setting} must be.*got {value}"):
            synthesise(model, x, **{setting: value})


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(1, 3, 8, 8).long(),
        torch.zeros(8),
        torch.zeros(1, 0),
        (),
        (torch.zeros(1, 3), torch.zeros(1, 3)),
        {"x": torch.zeros(1, 3), "mask": torch.zeros(1, 3)},
        {"x": "text"},
        3,
    ],
)
def test_other_example_inputs_are_refused(inputs):
    with pytest.raises(IntrafuseError, match=r"one example input.*--data"):
        synthesise(input_norm(), inputs)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
        nn.Sequential(nn.GroupNorm(1, 3)),
    ],
)
def test_a_model_without_running_statistics_is_refused(model):
    with pytest.raises(IntrafuseError, match=r"batch norm with running statistics.*--data"):
        synthesise(model, torch.zeros(1, 3))


def test_a_norm_that_is_never_reached_is_none():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.aside = nn.Linear(3, 2), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.head(x)

    with pytest.raises(IntrafuseError, match=r"batch norm with running statistics"):
        synthesise(Aside(), torch.zeros(1, 3))


@pytest.mark.parametrize(
    "buffer, value", [("running_mean", math.nan), ("running_var", math.inf), ("running_var", -1.0)]
)
def test_impossible_running_statistics_name_the_norm(buffer, value):
    model, x = build("chain")
    getattr(model[4], buffer)[0] = value
    with pytest.raises(IntrafuseError, match=r"running means must be finite.*\(at 4\)"):
        synthesise(model, x, images=4, steps=1)


def test_a_loss_that_is_not_finite_names_the_norm():
    model, x = build("chain")
    with torch.no_grad():
        model[3].weight[0] = math.nan
    with pytest.raises(IntrafuseError, match=r"became nan in step 1 \(at 4\)"):
        synthesise(model, x, images=4, steps=1)


def test_a_model_that_stops_gradients_is_refused():
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x.detach())

    with pytest.raises(IntrafuseError, match="no gradient"):
        synthesise(Stops(), torch.zeros(1, 3), images=4, steps=1)
