"""Importance metrics: known answers, laws, a model that stays untouched, and refusals."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from intrafuse import importance_data
from intrafuse.batchnorm import fold_norms
from intrafuse.context import Context
from intrafuse.errors import IntrafuseError
from intrafuse.graph import ChannelGroup, ExampleInputs, trace
from intrafuse.importance import IMPORTANCE, Importance, score
from intrafuse.merge import MergeMap
from intrafuse.weights import Weights

NEEDS_DATA = ("taylor", "chip", "activation")
RUNS_MODEL = ("synflow", *NEEDS_DATA)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_context(
    model: nn.Module, inputs: ExampleInputs, data: Iterable | None = None, *, seed: int = 0
) -> Context:
    """Trace a model and take its weights, as `plan` does."""
    weights = Weights.of(trace(model, inputs), model)
    return Context(weights, weights.snapshot(), model, inputs, data, seed)


def ask(context: Context, name: str, metric: str | Importance) -> Tensor:
    """Score the group of this name."""
    return score(context.weights.graph.by_name[name], context, metric)


def mlp(first: list[list[float]], second: list[list[float]]) -> nn.Sequential:
    """Build linear, ReLU, linear from two weight matrices, without biases."""
    rows, columns = torch.tensor(first), torch.tensor(second)
    model = nn.Sequential(
        nn.Linear(rows.shape[1], rows.shape[0], bias=False),
        nn.ReLU(),
        nn.Linear(columns.shape[1], columns.shape[0], bias=False),
    )
    model[0].weight.data, model[2].weight.data = rows, columns
    return model


def convnet(channels: int = 5) -> nn.Sequential:
    """Build conv, batch norm, ReLU, max-pool, flatten, linear, with batch norm that matters."""
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 4, 3),
    )
    norm = model[1]
    norm.weight.data.uniform_(-2, 2)
    norm.bias.data.uniform_(0, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model


def labelled(batches: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 2, 4, 4), torch.randint(3, (size,))) for _ in range(batches)]


class Residual(nn.Module):
    """Two writers of one stream, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.branch = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x.relu())
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Two groups side by side in one batch norm and one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.head(x).mean((2, 3))


class Attention(nn.Module):
    """Two heads of four dimensions: a head is a channel, with a block of four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1).mean(1))


# -- known answers: weights only -----------------------------------------------------------------

ROWS = [[3.0, -4.0], [0.0, 1.0], [-2.0, 0.0]]
KNOWN = {
    "l1": [7.0, 1.0, 2.0],
    "l2": [5.0, 1.0, 2.0],
    "linf": [4.0, 1.0, 2.0],
    "lamp": [1.0, 1 / 30, 4 / 29],
    "fpgm": [
        34**0.5 + 41**0.5,
        34**0.5 + 5**0.5,
        41**0.5 + 5**0.5,
    ],
}


@pytest.mark.parametrize("metric", KNOWN)
def test_norms_of_rows_worked_out_by_hand(metric: str):
    context = make_context(mlp(ROWS, [[1.0, 1.0, 1.0]]), torch.zeros(1, 2))
    torch.testing.assert_close(ask(context, "0", metric), torch.tensor(KNOWN[metric]))


def test_biases_do_not_count():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    context = make_context(model, torch.zeros(1, 2))
    before = {name: ask(context, "0", name) for name in KNOWN}
    nn.init.constant_(model[0].bias, 100.0)
    for name, scores in before.items():
        torch.testing.assert_close(ask(context, "0", name), scores, rtol=0, atol=0)


def balanced(norms: list[torch.Tensor]) -> torch.Tensor:
    """Average the norms of several writers, each divided by its mean; keep the mean level."""
    level = sum(float(norm.mean()) for norm in norms) / len(norms)
    return level * sum(norm / norm.mean() for norm in norms) / len(norms)


@pytest.mark.parametrize(("name", "p"), [("l1", 1), ("l2", 2), ("linf", torch.inf)])
def test_several_writers_count_alike(name, p):
    model = Residual()
    context = make_context(model, torch.zeros(1, 2, 3, 3))
    writers = [layer.weight.detach().flatten(1) for layer in (model.stem, model.branch)]
    expected = balanced([torch.linalg.vector_norm(rows, p, dim=1) for rows in writers])
    torch.testing.assert_close(ask(context, "stem", name), expected)


def test_the_scale_of_one_writer_does_not_decide():
    model = Residual()
    context = make_context(model, torch.zeros(1, 2, 3, 3))
    before = ask(context, "stem", "l1")
    with torch.no_grad():
        model.branch.weight *= 100
    after = ask(make_context(model, torch.zeros(1, 2, 3, 3)), "stem", "l1")
    torch.testing.assert_close(after / after.mean(), before / before.mean())


def test_heads_are_blocks_of_all_three_writers():
    model = Attention()
    context = make_context(model, torch.randn(2, 5, 8))
    expected = balanced([f.weight.detach().view(2, -1).abs().sum(1) for f in model.qkv])
    torch.testing.assert_close(ask(context, "qkv.0", "l1"), expected)


def test_grouped_convolution_scores_whole_groups():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)
    )
    gamma = model[2].weight.data.uniform_(-1, 1)
    context = make_context(model, torch.zeros(1, 3, 5, 5), [torch.randn(4, 3, 5, 5)])
    rows = model[0].weight.detach().view(4, -1)  # two outputs of the writer for each group
    torch.testing.assert_close(ask(context, "0", "l2"), rows.norm(dim=1))
    torch.testing.assert_close(ask(context, "0", "bn_scale"), gamma.abs().view(4, 4).sum(1))
    with torch.no_grad():
        read = model[:3].eval()(context.data[0]).transpose(0, 1).reshape(4, -1)
    torch.testing.assert_close(ask(context, "0", "activation"), read.abs().mean(1))


def test_transposed_convolution_writes_along_axis_one():
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    expected = model[0].weight.detach().transpose(0, 1).flatten(1).abs().sum(1)
    context = make_context(model, torch.zeros(1, 2, 3, 3))
    torch.testing.assert_close(ask(context, "0", "l1"), expected)


def test_lamp_of_equal_and_zero_channels():
    context = make_context(mlp([[1.0], [1.0], [0.0], [-1.0]], [[1.0] * 4]), torch.zeros(1, 1))
    expected = torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3])
    torch.testing.assert_close(ask(context, "0", "lamp"), expected)


def test_lamp_of_a_group_of_zeros_is_zero():
    context = make_context(mlp([[0.0], [0.0]], [[1.0, 1.0]]), torch.zeros(1, 1))
    assert ask(context, "0", "lamp").tolist() == [0.0, 0.0]


def test_fpgm_tells_nearly_equal_channels_apart():
    rows = 10 * torch.randn(1, 300) + 1e-2 * torch.randn(40, 300)
    context = make_context(mlp(rows.tolist(), [[1.0] * 40]), torch.zeros(1, 300))
    exact = (rows[:, None].double() - rows.double()).norm(dim=2).sum(1).float()
    torch.testing.assert_close(ask(context, "0", "fpgm"), exact)


def test_writerless_channels_are_judged_by_all_their_parameters():
    context = make_context(nn.Sequential(nn.PReLU(3), nn.Linear(3, 2)), torch.zeros(1, 3))
    model = context.model
    (group,) = (g for g in context.weights.graph.locked if g.size == 3)
    assert not group.writers
    expected = balanced([model[0].weight.detach().abs(), model[1].weight.detach().abs().sum(0)])
    torch.testing.assert_close(score(group, context, "l1"), expected)


def test_scores_follow_what_other_groups_became():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    context = make_context(model, torch.zeros(1, 2))
    context.weights.merge(MergeMap.select("0", 4, torch.tensor([1, 3])))
    expected = model[2].weight.detach()[:, [1, 3]].abs().sum(1)
    torch.testing.assert_close(ask(context, "2", "l1"), expected)
    assert ask(context, "0", "l1").shape == (2,)
    torch.testing.assert_close(ask(context.untouched(), "0", "l1").shape, torch.Size([4]))


# -- known answers: batch norm -------------------------------------------------------------------


def test_bn_scale_reads_gamma_also_once_folded():
    model = convnet()
    gamma = model[1].weight.detach().abs()
    context = make_context(model, torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(ask(context, "0", "bn_scale"), gamma)
    fold_norms(context.weights)
    folded = Context(context.weights, context.weights.snapshot(), model, torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(ask(folded, "0", "bn_scale"), gamma)


def test_bn_scale_of_a_norm_that_two_groups_share():
    model = Joined()
    model.norm.weight.data = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    context = make_context(model, torch.zeros(1, 2, 3, 3))
    assert ask(context, "a", "bn_scale").tolist() == [1, 2]
    assert ask(context, "b", "bn_scale").tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)], ids=type
)
def test_bn_scale_without_a_scale_of_a_batch_norm(norm: nn.Module):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    context = make_context(model, torch.zeros(1, 2, 3, 3))
    with pytest.raises(IntrafuseError, match=r'"bn_scale" needs a batch norm.*\(at 0\).*"l1"'):
        ask(context, "0", "bn_scale")


# -- known answers: synflow ----------------------------------------------------------------------


def test_synflow_of_a_chain_by_hand():
    # R = sum_c |b_c| |a_c|; a channel's share is |b_c| |a_c| / R.
    context = make_context(mlp([[1.0], [-2.0], [3.0]], [[4.0, 1.0, -1.0]]), torch.zeros(1, 1))
    expected = torch.tensor([4.0, 2.0, 3.0]) / 9
    torch.testing.assert_close(ask(context, "0", "synflow"), expected)


def test_synflow_of_a_batch_norm_by_hand():
    # gamma / std multiplies the channel; the mean is left out, and beta adds to R alone.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1))
    for layer, values in ((0, [[1.0], [-2.0]]), (2, [[4.0, 1.0]])):
        model[layer].weight.data = torch.tensor(values)
    norm = model[1]
    norm.weight.data, norm.bias.data = torch.tensor([-3.0, 5.0]), torch.tensor([0.5, -1.0])
    norm.running_mean, norm.running_var = torch.tensor([9.0, 9.0]), torch.tensor([4.0, 25.0])
    norm.eps, model[2].bias.data = 0.0, torch.tensor([-3.0])
    flow = torch.tensor([1 * (3 / 2) * 4, 2 * (5 / 5) * 1])
    total = flow.sum() + 0.5 * 4 + 1.0 * 1 + 3.0
    context = make_context(model, torch.zeros(2, 1))
    torch.testing.assert_close(ask(context, "0", "synflow"), flow / total)


def test_synflow_is_conserved_in_every_group_of_a_chain():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(inplace=True),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.GroupNorm(4, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 9, 5, bias=False),
        nn.LayerNorm(5),
        nn.Linear(5, 2, bias=False),
    )
    model[1].running_mean.fill_(100.0)
    model[1].running_var.uniform_(0.1, 4)
    model[4].weight.data.normal_()
    context = make_context(model, torch.zeros(3, 2, 5, 5))
    assert [g.name for g in context.weights.graph.groups] == ["0", "3"]
    for name in ("0", "3"):
        torch.testing.assert_close(ask(context, name, "synflow").sum(), torch.tensor(1.0))


def test_synflow_reaches_the_depth_where_float32_overflows():
    layers = [nn.Linear(64, 64, bias=False) for _ in range(60)]
    for layer in layers:
        nn.init.normal_(layer.weight)  # R grows by about 50 with each layer: 50 ** 60 > 1e100
    model = nn.Sequential(*layers)
    scores = ask(make_context(model, torch.zeros(1, 64)), "29", "synflow")
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
    assert scores.min() > 0


def test_synflow_that_overflows_float64_is_refused():
    model = mlp([[1e38], [1e38]], [[1e38, 1e38]])
    for _ in range(8):
        model.append(nn.Linear(1, 1, bias=False))
        nn.init.constant_(model[-1].weight, 1e38)
    with pytest.raises(IntrafuseError, match="overflows"):
        ask(make_context(model, torch.zeros(1, 1)), "0", "synflow")


def test_synflow_keeps_indices_and_takes_keyword_inputs():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.words(tokens))}

    model = Words()
    tokens = torch.tensor([[1, 3, 3]])
    context = make_context(model, {"tokens": tokens})
    read = model.words.weight[tokens[0]].abs().sum(0) * model.head.weight.abs().sum(0)
    total = read.sum() + 3 * model.head.bias.abs().sum()
    torch.testing.assert_close(ask(context, "words", "synflow"), (read / total).detach())


# -- known answers: data -------------------------------------------------------------------------


def test_activation_is_the_mean_of_what_the_reader_is_given():
    data = labelled()
    model = convnet().eval()
    context = make_context(model, torch.zeros(1, 2, 4, 4), data)
    with torch.no_grad():
        read = model[:4](torch.cat([x for x, _ in data]))
    torch.testing.assert_close(ask(context, "0", "activation"), read.abs().mean((0, 2, 3)))


def test_activation_counts_every_input_alike_in_uneven_batches():
    model = mlp([[1.0], [-1.0]], [[1.0, 1.0]])
    data = [torch.tensor([[1.0], [2.0], [6.0]]), (torch.tensor([[-4.0]]),)]
    context = make_context(model, torch.zeros(1, 1), data)
    torch.testing.assert_close(ask(context, "0", "activation"), torch.tensor([9 / 4, 4 / 4]))


def test_activation_of_groups_side_by_side():
    model, x = Joined().eval(), torch.randn(3, 2, 4, 4)
    context = make_context(model, torch.zeros(1, 2, 3, 3), [x])
    with torch.no_grad():
        joined = model.norm(torch.cat([model.a(x), model.b(x)], 1)).relu().mean((0, 2, 3))
    torch.testing.assert_close(ask(context, "a", "activation"), joined[:2])
    torch.testing.assert_close(ask(context, "b", "activation"), joined[2:])


def test_activation_of_a_sequence_and_its_heads():
    model, x = Attention().eval(), torch.randn(3, 5, 8)
    seen = []
    hook = model.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    context = make_context(model, torch.zeros(1, 5, 8), [x])
    expected = seen[0].view(3, 2, 4).abs().mean((0, 2))
    torch.testing.assert_close(ask(context, "qkv.0", "activation"), expected)


def test_activation_of_an_unbatched_image():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 5, 5)
    context = make_context(model, torch.zeros(2, 5, 5), [x])
    expected = model[:2](x).mean((1, 2)).detach()
    torch.testing.assert_close(ask(context, "0", "activation"), expected)


def test_two_readers_of_one_stream_and_the_first_of_them():
    model, x = Residual().eval(), torch.randn(3, 2, 4, 4)
    context = make_context(model, torch.zeros(1, 2, 3, 3), [x])
    with torch.no_grad():
        branch = model.stem(x).relu()
        head = (model.stem(x) + model.branch(branch)).mean((2, 3))
    both = (branch.abs().mean((0, 2, 3)) + head.abs().mean(0)) / 2
    torch.testing.assert_close(ask(context, "stem", "activation"), both)
    expected = nuclear_loss(branch.flatten(2).double()).mean(0).float()
    torch.testing.assert_close(ask(context, "stem", "chip"), expected, rtol=1e-5, atol=1e-6)


def nuclear_loss(features: Tensor) -> Tensor:
    """Follow the definition: one singular value decomposition for each channel."""
    n = features.shape[1]
    masks = 1 - torch.eye(n, dtype=features.dtype)
    whole = torch.linalg.matrix_norm(features, "nuc")
    return torch.stack(
        [whole - torch.linalg.matrix_norm(features * m[:, None], "nuc") for m in masks], 1
    )


@pytest.mark.parametrize("shape", [(3, 5, 30), (3, 30, 5), (2, 8, 8), (2, 6, 1), (1, 1, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_channel_independence_agrees_with_its_definition(shape: tuple[int, ...], scale: float):
    features = scale * torch.randn(shape, dtype=torch.float64).relu()
    if shape[1] > 3:
        features[:, 0] = 0  # a dead channel, two equal ones, a faint one
        features[:, 1] = features[:, 2]
        features[:, 3] *= 1e-3
    found = importance_data._independence(features)
    torch.testing.assert_close(found, nuclear_loss(features), rtol=1e-6, atol=1e-7 * scale)


def test_channel_independence_of_orthogonal_channels_is_their_norm():
    features = torch.diag(torch.tensor([3.0, 1.0, 0.5]))[None]
    found = importance_data._independence(features)
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0, 0.5]]).double(), rtol=1e-7, atol=0)


def test_chip_of_a_network():
    data = labelled()
    model = convnet().eval()
    context = make_context(model, torch.zeros(1, 2, 4, 4), data)
    with torch.no_grad():
        read = model[:4](torch.cat([x for x, _ in data])).flatten(2).double()
    expected = nuclear_loss(read).mean(0).float()
    torch.testing.assert_close(ask(context, "0", "chip"), expected, rtol=1e-5, atol=1e-6)


def test_chip_reads_five_batches_and_no_more():
    def batches():
        for n in range(6):
            assert n < 5, "a sixth batch was asked for"
            yield torch.randn(2, 2, 4, 4)

    context = make_context(convnet(), torch.zeros(1, 2, 4, 4), batches())
    assert ask(context, "0", "chip").shape == (5,)


def test_taylor_by_hand():
    # One logit pair (0, z) has dL/dz = sigmoid(z) - y; z = sum_c b_c a_c x, so g_c a_c = that
    # times b_c a_c x; squared, and averaged over batches of one.
    model = mlp([[1.0], [2.0]], [[0.0, 0.0], [0.5, 1.0]])
    data = [(torch.tensor([[1.0]]), torch.tensor([1])), (torch.tensor([[2.0]]), torch.tensor([0]))]
    context = make_context(model, torch.zeros(1, 1), data)
    slope = torch.sigmoid(torch.tensor([2.5, 5.0])) - torch.tensor([1.0, 0.0])
    change = slope[:, None] * torch.tensor([[0.5, 2.0]]) * torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(ask(context, "0", "taylor"), change.square().mean(0))


def test_taylor_agrees_with_autograd_on_several_writers_and_biases():
    model, x, y = Residual(), torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    context = make_context(model, torch.zeros(1, 2, 3, 3), [(x, y)])
    found = ask(context, "stem", "taylor")
    nn.functional.cross_entropy(model(x), y).backward()
    change = torch.zeros(4)
    for p in (model.stem.weight, model.stem.bias, model.branch.weight):
        change += (p * p.grad).detach().view(4, -1).sum(1)
    torch.testing.assert_close(found, change.square())


def test_taylor_takes_labels_for_every_position_of_a_sequence():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(2, 5, 2), torch.randint(3, (2, 5))
    long = make_context(model, torch.zeros(1, 5, 2), [(x, y)])
    flat = make_context(model, torch.zeros(1, 2), [(x.flatten(0, 1), y.flatten())])
    torch.testing.assert_close(ask(long, "0", "taylor"), ask(flat, "0", "taylor"))


def test_taylor_of_frozen_parameters_under_no_grad_and_inference_mode():
    data = labelled()
    context = make_context(convnet(), torch.zeros(1, 2, 4, 4), data)
    expected = ask(context, "0", "taylor")
    assert expected.min() > 0
    for parameter in context.model.parameters():
        parameter.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        fresh = Context(context.weights, context.weights.snapshot(), *_rest(context))
        with mode():
            torch.testing.assert_close(ask(fresh, "0", "taylor"), expected)
            assert ask(fresh, "0", "synflow").sum() > 0
    assert not any(p.requires_grad for p in context.model.parameters())


def _rest(context: Context) -> tuple:
    return context.model, context.example_inputs, context.data


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
    assert Counting.calls == (1 if metric == "synflow" else 2)


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
        ([torch.randn(3, 1, 4, 4)], "cannot run the model: RuntimeError"),
        ([torch.full((1, 2, 4, 4), torch.nan)], r"activations must be finite.*\(at 5\)"),
    ],
)
def test_bad_data(context: Context, data, message: str):
    with pytest.raises(IntrafuseError, match=message):
        ask(with_data(context, data), "0", "activation")


def test_readers_that_are_no_modules_cannot_be_watched():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 4)
            self.second = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.first(x).relu(), self.second)

    context = make_context(Functional(), torch.zeros(1, 2), [torch.randn(3, 2)])
    assert ask(context, "first", "l1").shape == (4,)
    for metric in ("activation", "chip"):
        with pytest.raises(IntrafuseError, match=r"none of the modules.*\(at first\).*exclude"):
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
