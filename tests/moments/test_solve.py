"""Layers solved on data: known answers, what a plan keeps of them, odd data."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import build, covering
from torch import Tensor, nn

import intrafuse
from intrafuse import IntrafuseError, Plan
from intrafuse.graph import trace
from intrafuse.methods import Auto, Moment
from intrafuse.moments.solve import solvable, solve_layers
from intrafuse.surgery.merged import merged_output
from intrafuse.surgery.weights import Weights
from intrafuse.sweep.activations import Activations, Batches
from intrafuse.sweep.patches import drawn, is_plain, lines, patches

CALIBRATED = Moment(source="calibration")
SOLVED = ["chain", "residual", "dense", "grouped", "separable", "option-a", "conv1d", "mlp"]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def chain() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
            nn.Conv2d(8, 3, 1),
        )
    )


def like(x: Tensor, count: int = 3) -> list[Tensor]:
    return [noise(24, *x.shape[1:], seed=s) for s in range(count)]


def error(model, smaller, data) -> float:
    """The mean squared error of outputs, in units of their variance."""
    with torch.no_grad():
        pairs = [(model(x), smaller(x)) for x in data]
    return float(sum(((a - b).square().mean() / a.var()) for a, b in pairs) / len(pairs))


# --- what a layer reads


CONVOLUTIONS = [
    (nn.Conv2d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 4, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    (nn.Conv1d, {"kernel_size": 5, "stride": 3, "padding": 2}),
    (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": 1}),
    (nn.Linear, {}),
]


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(("kind", "settings"), CONVOLUTIONS)
def test_patches_times_the_weight_are_the_outputs(kind, settings, unbatched):
    layer = seeded(lambda: kind(4, 6, **settings))
    dims = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    shape = (4, *[7] * dims) if dims else (5, 4)
    x = noise(*shape) if unbatched else noise(3, *shape)
    graph = trace(layer, x)
    run = Activations(Weights.of(graph, layer), Batches(layer, graph, [x]))
    (node,) = (n for n in graph.program.nodes if n.op == "call_function" and is_plain(n))
    outputs, axis = run.of(node)[0], -1 - dims
    rest = [*outputs.shape]
    del rest[axis]
    at = drawn(rest, 20)
    source = run.of(node.all_input_nodes[0])[0]
    taken = patches(run.batches.twins[0][node], source, layer.weight.shape[2:], at)
    groups = settings.get("groups", 1)
    rows = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    by_group = taken.flatten(1).unflatten(1, (groups, -1))
    got = torch.einsum("ngd,god->ngo", by_group, rows).flatten(1) + layer.bias.detach()
    torch.testing.assert_close(got, lines(outputs, axis, at), rtol=1e-5, atol=1e-5)


# --- known answers


def test_a_linear_reader_is_the_regression_on_what_is_left():
    """Enough samples and no noise: the least squares of NumPy, up to a weak ridge."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)))
    data = [noise(4000, 6)]
    method = Moment(source="calibration", transport="none", max_gain=0.0)
    made = intrafuse.plan(model, data[0], channels=0.5, method=method, data=data)
    small = made.apply(model)
    with torch.no_grad():
        hidden = small[:2](data[0]).double().numpy()
        wanted = model(data[0]).double().numpy()
    ones = np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
    best, *_ = np.linalg.lstsq(ones, wanted, rcond=None)
    least = np.square(ones @ best - wanted).mean() / wanted.var()
    assert error(model, small, data) < 1.05 * least


def test_a_channel_that_the_kernel_can_restore_is_restored():
    """One channel is another one, shifted by a pixel: only whole kernels see it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, data = seeded(Net), [noise(16, 1, 12, 12, seed=s) for s in range(4)]
    with torch.no_grad():
        model.first.weight[2].zero_()
        model.first.weight[2, 0, :, 1:] = model.first.weight[0, 0, :, :-1]
        model.first.weight[:2, :, :, 2] = 0
        model.first.bias.zero_()
        model.second.weight[:, 2, :, 2] = 0  # a pixel further than the kernel reaches
    keep = torch.tensor([0, 1])

    class First(Moment):
        def __call__(self, group, scores, width, context):
            return intrafuse.MergeMap.select(group.name, group.size, keep)

    only = intrafuse.plan(model, data[0], channels=0.3, method="select")
    dropped = intrafuse.MergeMap.select(only.maps[0].group, 3, keep)
    before = error(model, only.with_maps([dropped]).apply(model), data)
    made = intrafuse.plan(
        model, data[0], channels=0.3, method=First(source="calibration"), data=data
    )
    after = error(model, made.apply(model), data)
    assert before > 0.1 and after < 0.01 * before


def test_nothing_changes_where_nothing_was_pruned():
    model, data = build("residual")[0], like(build("residual")[1])
    graph = trace(model, data[0])
    batches, weights = Batches(model, graph, data), Weights.of(graph, model)
    original, same = Activations(weights, batches, fixed=True), Activations(weights, batches)
    assert solvable(graph) and solve_layers(original, same, []) == {}
    made = intrafuse.plan(model, data[0], channels=0.0, method=CALIBRATED, data=data)
    assert not made.maps and not made.solved.tensors


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped", "separable", "mlp"])
def test_outputs_of_a_layer_are_merged_as_the_layer_is(name):
    """On the inputs of the original, a layer whose outputs alone are merged gives these."""
    model, x = build(name)
    made = intrafuse.plan(model, x, channels=0.5, method="folding")
    graph, data = made.graph, Batches(model, made.graph, like(x))
    weights = made.weights(model)
    original = Weights.of(graph, model)
    for norm in graph.norms:
        original.fold(norm)
    was, now = Activations(original, data), Activations(weights, data)
    first = next(iter(solvable(graph).items()), None)
    assert first is not None
    node, layer = first  # it reads the network's inputs, which no plan changes
    tree = graph.axes[layer.weight][layer.output_axis]
    for old, new in zip(was.of(node), now.of(node), strict=True):
        wanted = merged_output(graph, made.maps, tree, layer.weight, old.double(), 1)
        torch.testing.assert_close(wanted.to(new), new, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), covering(SOLVED, [(Moment, 0.25), (Auto, 1.0)]))
def test_solving_keeps_most_of_what_pruning_loses(name, kind):
    """On samples that were not seen: a quarter of the error of the same maps, or less.

    The maps of `auto` re-solve single readers already.
    """
    method, most = kind
    model, x = build(name)
    seen, fresh = like(x), [noise(24, *x.shape[1:], seed=9)]
    made = intrafuse.plan(model, x, channels=0.5, method=method(source="calibration"), data=seen)
    solved, plain = made.apply(model), made.with_maps(made.maps).apply(model)
    assert error(model, solved, fresh) < most * error(model, plain, fresh)


# --- what a plan keeps


def test_a_saved_plan_holds_the_solved_layers(tmp_path):
    model, data = chain(), [noise(16, 2, 8, 8, seed=s) for s in range(2)]
    made = intrafuse.plan(model, data[0], channels=0.5, method=CALIBRATED, data=data)
    made.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    for name, tensor in made.weights(model).state.items():
        assert torch.equal(tensor, loaded.weights(model).state[name])
    assert made.solved.tensors.keys() == loaded.solved.tensors.keys() == {
        *("2.weight", "2.bias", "4.weight", "4.bias"),
    }  # fmt: skip


def test_solved_layers_fit_only_the_network_of_the_plan():
    model, data = chain(), [noise(16, 2, 8, 8)]
    made = intrafuse.plan(model, data[0], channels=0.5, method=CALIBRATED, data=data)
    other = copy.deepcopy(model)
    nn.init.normal_(other[2].weight)
    with pytest.raises(IntrafuseError, match=r"only to the network that .*\(at 2\)"):
        made.apply(other)
    made.with_maps(made.maps).apply(other)
    made.apply(copy.deepcopy(model).half().float())  # rounding is no other network


# --- odd data


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (2, 2, 5, 5), (3, 2, 5, 5)])
def test_few_samples(shape):
    model, data = chain(), [noise(*shape)]
    pruned = intrafuse.prune(model, data[0], channels=0.5, method=CALIBRATED, data=data).model
    assert torch.isfinite(pruned(data[0])).all()


def test_activations_that_are_constant_or_not_finite():
    model, x = chain(), torch.zeros(4, 2, 8, 8)
    pruned = intrafuse.prune(model, x, channels=0.5, method=CALIBRATED, data=[x]).model
    assert (pruned(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[2].weight.mul_(1e30)
    with pytest.raises(IntrafuseError, match="finite on the data"):
        intrafuse.plan(model, x + 1, channels=0.5, method=CALIBRATED, data=[x + 1])


def test_half_precision_keeps_its_type():
    model, x = chain().bfloat16(), noise(8, 2, 8, 8).bfloat16()
    pruned = intrafuse.prune(model, x, channels=0.5, method=CALIBRATED, data=[x]).model
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}


def test_a_layer_without_room_for_a_bias_and_one_that_is_called_twice():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 12)
            self.weight = nn.Parameter(torch.randn(3, 12))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.b(torch.tanh(self.b(F.relu(self.a(x))))))
            return F.linear(x, self.weight)

    model, data = seeded(Net), [noise(200, 6)]
    made = intrafuse.plan(model, data[0], channels=0.5, method=CALIBRATED, data=data)
    assert "b.weight" not in made.solved.tensors and "weight" in made.solved.tensors
    plain = made.with_maps(made.maps).apply(model)
    assert error(model, made.apply(model), data) < error(model, plain, data)


def test_the_data_is_drawn_alike_each_time():
    first, second = (drawn([7, 9, 11], 50) for _ in range(2))
    assert all(map(torch.equal, first, second)) and len(first[0]) == 50
    whole = drawn([2, 3], 50)
    assert [*map(partial(torch.Tensor.tolist), whole)] == [[0, 0, 0, 1, 1, 1], [0, 1, 2] * 2]
