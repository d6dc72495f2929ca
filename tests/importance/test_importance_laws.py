"""Importance metrics: laws, models left as they were, refusals."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import pytest
import torch
from importance_networks import (
    NEEDS_DATA,
    RUNS_MODEL,
    Joined,
    ask,
    convnet,
    labelled,
    make_context,
    mlp,
)
from torch import Tensor, nn

from intrafuse.graph import ChannelGroup
from intrafuse.importance import on_data as importance_data
from intrafuse.importance.metrics import IMPORTANCE, score
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", IMPORTANCE)
def test_every_metric_gives_one_float32_for_each_channel(metric: str):
    context = make_context(convnet(), torch.zeros(1, 2, 4, 4), labelled())
    scores = ask(context, "0", metric)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    assert scores.min() >= 0 and not scores.requires_grad


@pytest.mark.parametrize("metric", [m for m in IMPORTANCE if m != "random"])
def test_permuted_channels_have_permuted_scores(metric: str):
    order, data = torch.tensor([3, 0, 4, 1, 2]), labelled()
    model = convnet()
    before = ask(make_context(model, torch.zeros(1, 2, 4, 4), data), "0", metric)
    for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
        if tensor.dim():
            tensor.data = tensor.data[order]
    columns = model[5].weight.data.view(3, 5, 4)
    model[5].weight.data = columns[:, order].reshape(3, -1)
    after = ask(make_context(model, torch.zeros(1, 2, 4, 4), data), "0", metric)
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-6)


# The power of a by which scores grow when writers grow by a, and readers shrink as much.
DEGREE = {
    **dict.fromkeys(("l1", "l2", "linf", "fpgm", "activation", "chip"), 1),
    **dict.fromkeys(("lamp", "synflow", "taylor"), 0),
}


@pytest.mark.parametrize("metric", DEGREE)
def test_scores_scale_with_the_writers(metric: str):
    model, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(7, 3)
    data = [(x, torch.randint(3, (7,)))]
    before = ask(make_context(model, x, data), "0", metric)
    for parameter in model[0].parameters():
        parameter.data *= 4.0
    model[2].weight.data /= 4.0
    after = ask(make_context(model, x, data), "0", metric)
    torch.testing.assert_close(after, before * 4.0 ** DEGREE[metric], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("metric", ["activation", "chip", "taylor", "synflow"])
def test_a_dead_channel_has_no_importance(metric: str):
    model = convnet()
    model[1].weight.data[2] = model[1].bias.data[2] = 0.0
    scores = ask(make_context(model, torch.zeros(1, 2, 4, 4), labelled()), "0", metric)
    assert scores[2] < 1e-6 * scores.max()


def test_random_depends_on_seed_and_group_only():
    class Two(nn.Sequential):
        pass

    model = Two(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    first = make_context(model, torch.zeros(1, 2), seed=3)
    again = make_context(model, torch.zeros(1, 2), seed=3)
    other = make_context(model, torch.zeros(1, 2), seed=4)
    torch.manual_seed(99)
    torch.testing.assert_close(ask(first, "0", "random"), ask(again, "0", "random"))
    assert not torch.equal(ask(first, "0", "random"), ask(other, "0", "random"))
    assert not torch.equal(ask(first, "0", "random"), ask(first, "2", "random"))


@pytest.mark.parametrize("metric", RUNS_MODEL)
def test_one_pass_serves_all_groups(metric: str):
    class Counting(Joined):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    data = [(torch.randn(4, 2, 3, 3), torch.randint(3, (4,))) for _ in range(2)]
    context = make_context(Counting(), torch.zeros(1, 2, 3, 3), data)
    Counting.calls = 0
    first, _ = ask(context, "a", metric), ask(context, "b", metric)
    first.fill_(-1)  # what a caller does to its scores does not reach the next one
    assert ask(context, "a", metric).min() >= 0
    # activation and chip call it once, to trace it at the shape of both batches
    assert Counting.calls == (2 if metric == "taylor" else 1)


def test_other_data_are_not_mistaken_for_the_data_that_were_scored():
    context = make_context(mlp([[1.0], [-1.0]], [[1.0, 1.0]]), torch.zeros(1, 1))
    for value in (1.0, 2.0, 3.0):
        data = [torch.tensor([[value]])]
        known = Context(context.weights, context.original, context.model, torch.zeros(1, 1), data)
        assert ask(known, "0", "activation").tolist() == [value, 0.0]


def test_what_was_scored_is_forgotten_with_the_plan():
    gc.collect()
    before = len(importance_data._KNOWN)
    context = make_context(convnet(), torch.zeros(1, 2, 4, 4), labelled())
    ask(context, "0", "synflow")
    assert len(importance_data._KNOWN) == before + 1
    del context
    gc.collect()
    assert len(importance_data._KNOWN) == before


# -- the model stays as it was -------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple:
    """Take everything that a metric could have changed."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    grads = [(p.grad, p.requires_grad, id(p)) for p in model.parameters()]
    return tensors, flags, hooks, grads


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = state_of(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]


@pytest.mark.parametrize("metric", IMPORTANCE)
def test_the_model_is_not_touched(metric: str):
    model = convnet().train()
    model[1].eval()  # a mixture of modes comes back as it was
    context = make_context(model, torch.zeros(1, 2, 4, 4), labelled())
    before = state_of(model)
    ask(context, "0", metric)
    assert_unchanged(model, before)


@pytest.mark.parametrize("metric", NEEDS_DATA)
@pytest.mark.parametrize(
    ("batch", "error"),
    [
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2).long()), IntrafuseError),  # channels
        ((torch.full((2, 2, 4, 4), torch.nan), torch.zeros(2).long()), IntrafuseError),
        (KeyError("a loader that fails"), KeyError),
    ],
    ids=["shape", "nan", "loader"],
)
def test_the_model_is_not_touched_by_data_that_fail(metric: str, batch, error: type[Exception]):
    def batches():
        yield from labelled(1)
        if isinstance(batch, Exception):
            raise batch
        yield batch

    model = convnet().train()
    context = make_context(model, torch.zeros(1, 2, 4, 4), batches())
    before = state_of(model)
    with pytest.raises(error):
        ask(context, "0", metric)
    assert_unchanged(model, before)


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def context() -> Context:
    return make_context(convnet(), torch.zeros(1, 2, 4, 4))


def with_data(context: Context, data: Iterable) -> Context:
    return Context(context.weights, context.original, context.model, context.example_inputs, data)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_metrics_that_need_data_say_how_to_give_it(context: Context, metric: str):
    with pytest.raises(IntrafuseError, match=f'"{metric}" needs data.*data=.*--data'):
        ask(context, "0", metric)


@pytest.mark.parametrize(
    "batch", [torch.randn(3, 2, 4, 4), [torch.randn(3, 2, 4, 4)], (torch.randn(3, 2, 4, 4), None)]
)
def test_taylor_without_labels(context: Context, batch):
    with pytest.raises(IntrafuseError, match=r"needs labels.*\(inputs, labels\)"):
        ask(with_data(context, [batch]), "0", "taylor")


def test_labels_that_the_outputs_do_not_fit(context: Context):
    data = [(torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 7]))]
    with pytest.raises(IntrafuseError, match=r"cannot run the model: .*7"):
        ask(with_data(context, data), "0", "taylor")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data gave no batch"),
        (iter(()), "data gave no batch.*not an iterator"),
        (torch.randn(3, 2, 4, 4), "must be an iterable of batches; got 'Tensor'"),
        (3, "must be an iterable of batches; got 'int'"),
        ([(1, 2, 3)], "inputs, labels.*got '3 parts'"),
        ([torch.randn(3, 1, 4, 4)], r"refused batch 1 of the data: .*1 channels.*Remedy"),
        ([torch.full((1, 2, 4, 4), torch.nan)], r"data must be finite, but batch 1 .*got 'nan'"),
        ([torch.full((1, 2, 4, 4), -torch.inf)], r"activations must be finite.*\(at 5\)"),
    ],
)
def test_bad_data(context: Context, data, message: str):
    with pytest.raises(IntrafuseError, match=message):
        ask(with_data(context, data), "0", "activation")


def test_channels_that_no_layer_reads_cannot_be_measured():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 4)
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x).relu() * self.scale).sum(1)

    context = make_context(Scaled(), torch.zeros(1, 2), [torch.randn(3, 2)])
    assert ask(context, "first", "l1").shape == (4,)
    for metric in ("activation", "chip"):
        with pytest.raises(IntrafuseError, match=r"no convolution or.*\(at first\).*exclude"):
            ask(context, "first", metric)


def test_locked_groups_have_no_activation(context: Context):
    (group,) = (g for g in context.weights.graph.locked if g.name == "5")
    known = with_data(context, labelled())
    with pytest.raises(IntrafuseError, match=r"locked \(at 5\)"):
        score(group, known, "activation")
    assert score(group, known, "l1").shape == (3,)


@pytest.mark.parametrize(("name", "near"), [("L1", "l1"), ("tailor", "taylor"), ("zzz", "fpgm")])
def test_unknown_names_get_near_matches(context: Context, name: str, near: str):
    with pytest.raises(IntrafuseError, match=f"unknown importance; got '{name}'.*{near}") as info:
        ask(context, "0", name)
    assert info.value.usage


def test_an_importance_that_is_neither_name_nor_function(context: Context):
    with pytest.raises(IntrafuseError, match="name or a function"):
        ask(context, "0", 3)  # type: ignore[arg-type]


def test_a_function_of_the_users_own(context: Context):
    def ascending(group: ChannelGroup, context: Context) -> Tensor:
        return torch.arange(group.size)

    assert ask(context, "0", ascending).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(4), r"one score for each of 5 channels \(at 0\); got \(4,\)"),
        (torch.ones(5, 1), r"got \(5, 1\)"),
        ([1.0] * 5, "got 'list'"),
        (torch.tensor([1, 1, torch.nan, 1, torch.inf]), r"2 of 5 .* channel 2 \(at 0\); got nan"),
        (torch.full((5,), 1e300, dtype=torch.float64), "finite.*5 of 5"),
    ],
)
def test_scores_are_checked(context: Context, scores, message: str):
    def mine(group: ChannelGroup, context: Context) -> Tensor:
        return scores

    with pytest.raises(IntrafuseError, match=f'importance "mine".*{message}'):
        ask(context, "0", mine)


def test_scores_of_the_given_model_for_a_group_that_was_merged(context: Context):
    context.weights.merge(MergeMap.select("0", 5, torch.tensor([0, 2])))
    with pytest.raises(IntrafuseError, match=r"each of 2 channels.*before the group is merged"):
        ask(context, "0", "bn_scale")
