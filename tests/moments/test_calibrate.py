"""Measured moments: against NumPy for the original and the pruned network; odd data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import build
from torch import Tensor, nn

import intrafuse
from intrafuse import IntrafuseError
from intrafuse.graph import trace
from intrafuse.methods import Auto, Moment
from intrafuse.moments import calibrate
from intrafuse.moments.calibrate import Calibration
from intrafuse.surgery.weights import Weights


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
        ).eval()


def halved(model, x):
    """Give the graph, and weights whose first group was merged, as a method would find them."""
    made = intrafuse.plan(model, x, channels=0.5, method="folding", include=["0"])
    return made.graph, made.weights(model), made.apply(model)


def line(model, data):
    """What enters the last layer: (channels, samples), in float64."""
    with torch.no_grad():
        return torch.cat([model[:-1](x).movedim(1, 0).flatten(1) for x in data], 1).double().numpy()


class Model(nn.Module):
    """One layer that is called twice, behind another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = F.relu(self.a(x if scale is None else x * scale))
        return self.c(input=torch.tanh(self.b(torch.tanh(self.b(x)))))


class Shuffling:
    """A loader that gives its samples in another order each time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.reads = x, 0

    def __iter__(self):
        self.reads += 1
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.reads))
        return iter(self.x[order].split(8))


def check_numpy(found, old, new):
    """Compare with NumPy: old (n, samples), new (m, samples)."""
    both = np.cov(np.concatenate([old, new]), bias=True)
    n = len(old)
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found.old.numpy(), both[:n, :n], **close)
    np.testing.assert_allclose(found.new.numpy(), both[n:, n:], **close)
    np.testing.assert_allclose(found.cross.numpy(), both[:n, n:], **close)
    np.testing.assert_allclose(found.old_mean.numpy(), old.mean(1), **close)
    np.testing.assert_allclose(found.new_mean.numpy(), new.mean(1), **close)


# --- known answers


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_old_and_new_moments_agree_with_numpy(offset):
    """Also where activations lie far from zero: float32 must not drown their spread."""
    model, data = chain(), [noise(5, 2, 7, 7, seed=s) + offset for s in range(3)]
    graph, weights, small = halved(model, data[0])
    found = Calibration(model, data).readings(graph.by_name["2"], weights)["4.weight"]
    old, new = line(model, data), line(small, data)
    if not offset:
        return check_numpy(found, old, new)
    joint = np.cov(np.concatenate([old, new]), bias=True)
    spread = joint.diagonal().max()
    for part, want in ((found.old, joint[:8, :8]), (found.cross, joint[:8, 8:])):
        np.testing.assert_allclose(part.numpy(), want, atol=1e-3 * spread)
    assert float(torch.linalg.eigvalsh(found.new)[0]) > -1e-5 * spread


def test_nothing_merged_gives_one_network_twice():
    model, data = chain(), [noise(4, 2, 6, 6)]
    graph = trace(model, data[0])
    found = Calibration(model, data).readings(graph.by_name["2"], Weights.of(graph, model))
    for reading in found.values():
        torch.testing.assert_close(reading.old, reading.new, rtol=0, atol=0)
        torch.testing.assert_close(reading.old, reading.cross, rtol=1e-5, atol=1e-7)


def test_data_that_is_shuffled_is_read_once_in_pairs():
    model, data = chain(), Shuffling(noise(24, 2, 6, 6))
    graph, weights, small = halved(model, data.x)
    calibration = Calibration(model, data)
    for _ in range(2):
        found = calibration.readings(graph.by_name["2"], weights)["4.weight"]
        check_numpy(found, line(model, [data.x]), line(small, [data.x]))
    assert data.reads == 1


def test_all_calls_of_a_layer_count():
    model, data = Model().eval(), [noise(50, 4)]
    graph = trace(model, data[0])
    group = next(g for g in graph.groups if "a" in g.layers)
    found = Calibration(model, data).readings(group, Weights.of(graph, model))["b.weight"]
    with torch.no_grad():
        first = F.relu(model.a(data[0]))
        both = torch.cat([first, torch.tanh(model.b(first))]).double().numpy().T
    assert found.calls == 2
    np.testing.assert_allclose(found.old.numpy(), np.cov(both, bias=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["tuple", "mapping", "labels", "nested"])
def test_forms_of_batches(form):
    model = Model().eval()
    x, scale = noise(30, 4), torch.rand(30, 4, generator=torch.Generator().manual_seed(2))
    batch = {
        "tuple": ((x, scale),),
        "mapping": {"x": x, "scale": scale},
        "labels": ((x, scale), torch.zeros(30)),
        "nested": ({"x": x, "scale": scale}, None),
    }[form]
    graph = trace(model, (x, scale))
    group = next(g for g in graph.groups if "a" in g.layers)
    found = Calibration(model, [batch]).readings(group, Weights.of(graph, model))["c.weight"]
    with torch.no_grad():
        h = torch.tanh(model.b(torch.tanh(model.b(F.relu(model.a(x * scale))))))
    np.testing.assert_allclose(found.old.numpy(), np.cov(h.T.double(), bias=True), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 3, 1)), (2, 9)),
        ((nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)), (2, 9, 5)),
        ((nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 1)), (2, 9, 5)),
        ((nn.Conv3d(2, 6, 3), nn.ReLU(), nn.ConvTranspose3d(6, 3, 1)), (2, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_every_convolution_with_and_without_a_batch(layers, shape, batched):
    model = nn.Sequential(*layers).eval()
    x = noise(4, *shape) if batched else noise(*shape)
    graph = trace(model, x)
    (found,) = Calibration(model, [x]).readings(graph.groups[0], Weights.of(graph, model)).values()
    with torch.no_grad():
        h = model[:2](x).movedim(-len(shape), 0).flatten(1).double().numpy()
    np.testing.assert_allclose(found.old.numpy(), np.cov(h, bias=True), rtol=1e-4, atol=1e-7)


def test_a_linear_layer_that_reads_a_vector():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = [noise(4, seed=s) for s in range(20)]
    graph = trace(model, data[0])
    (found,) = Calibration(model, data).readings(graph.groups[0], Weights.of(graph, model)).values()
    with torch.no_grad():
        h = model[:2](torch.stack(data)).double().numpy().T
    np.testing.assert_allclose(found.old.numpy(), np.cov(h, bias=True), rtol=1e-4, atol=1e-7)


# --- bounds


def test_more_positions_than_are_kept_are_sampled(monkeypatch):
    monkeypatch.setattr(calibrate, "SAMPLES", 6000)
    model, data = chain(), [noise(3, 2, 60, 60, seed=s) for s in range(3)]  # 28,227 positions
    graph, weights, small = halved(model, data[0])
    calibration = Calibration(model, data)
    found = calibration.readings(graph.by_name["2"], weights)["4.weight"]
    old, new = line(model, data), line(small, data)
    both = np.cov(np.concatenate([old, new]), bias=True)
    spread = both.diagonal().max()
    for part, want in ((found.old, both[:8, :8]), (found.new, both[8:, 8:]),
                       (found.cross, both[:8, 8:])):  # fmt: skip
        np.testing.assert_allclose(part.numpy(), want, atol=0.06 * spread)
    # the same positions in both networks: where nothing was merged, the same values
    whole = calibration.readings(graph.by_name["2"], Weights.of(graph, model))["4.weight"]
    assert torch.equal(whole.old, whole.new)


def test_no_more_batches_than_are_needed_are_read():
    read = []

    class Endless:
        def __iter__(self):
            while True:
                read.append(1)
                yield noise(1, 2, 6, 6)

    assert len(Calibration(chain(), Endless()).inputs) == len(read) == calibrate.BATCHES


# --- what stays


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_nothing_behind(fails):
    model, data = chain().train(), [noise(4, 2, 6, 6)]
    graph = trace(model, data[0])
    calibration = Calibration(model, [noise(4, 3, 6, 6)] if fails else data)
    if fails:
        with pytest.raises(IntrafuseError, match=r"refused batch 1 .*3 channels"):
            calibration.readings(graph.by_name["0"], Weights.of(graph, model))
    else:
        calibration.readings(graph.by_name["0"], Weights.of(graph, model))
    for module in model.modules():
        assert module.training and not module._forward_pre_hooks and not module._forward_hooks


# --- failures


@pytest.mark.parametrize("method", [Moment(source="calibration"), Auto(source="calibration")])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "calibration needs data.*--data SPEC"),
        ([], "data gave no batch"),
        (torch.zeros(2, 3, 6, 6), "iterable of batches"),
        ([torch.full((2, 3, 6, 6), torch.nan)], "data must be finite, but batch 1 .*got 'nan'"),
        ([torch.full((2, 3, 6, 6), torch.inf)], "data must be finite, but batch 1 .*got 'inf'"),
        ([torch.full((2, 3, 6, 6), -torch.inf)], r"activations must be finite on the data \(at"),
        ([torch.zeros(0, 3, 6, 6)], "no sample"),
        ([torch.zeros(2, 3, 6, 6), torch.zeros(2, 5, 6, 6)], r"refused batch 2 of the .* 5 chan"),
        ([{"image": torch.zeros(2, 3, 6, 6)}], r"refused batch 1 .*keyword argument 'image'.*fit"),
        ([np.zeros((2, 3, 6, 6))], "refused batch 1 of the data"),
        ([None], "refused batch 1 of the data"),
    ],
)
def test_data_that_tells_nothing(method, data, message):
    model, x = build("chain")
    with pytest.raises(IntrafuseError, match=message):
        intrafuse.prune(model, x, channels=0.5, method=method, data=data)


def test_a_batch_without_samples_does_not_count():
    model, x = build("chain")
    method = Moment(source="calibration")
    one, two = (
        intrafuse.prune(model, x, channels=0.5, method=method, data=data).model.state_dict()
        for data in ([x], [x[:0], x, x[:0]])
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)
