"""Importance metrics: known answers."""

from __future__ import annotations

import pytest
import torch
from importance_networks import (
    Attention,
    Joined,
    Residual,
    ask,
    convnet,
    labelled,
    make_context,
    mlp,
)
from torch import Tensor, nn

from intrafuse.importance import on_data as importance_data
from intrafuse.importance.metrics import score
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    torch.testing.assert_close(ask(context, "qkv.0#heads", "l1"), expected)


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
    torch.testing.assert_close(ask(context, "qkv.0#heads", "activation"), expected)


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


class Functional(nn.Module):
    """Reads channels by a function, twice, and writes into a part of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = nn.functional.linear(h, self.second)
        h.narrow(0, 1, 2).mul_(-2.0)
        return y + nn.functional.linear(h, self.second)


def test_readers_that_are_functions_read_what_they_are_given():
    model, x = Functional(), torch.randn(3, 2)
    context = make_context(model, torch.zeros(3, 2), [x])
    with torch.no_grad():
        h = model.first(x)
    expected = h.abs().mul(torch.tensor([1.0, 1.5, 1.5])[:, None]).mean(0)
    torch.testing.assert_close(ask(context, "first", "activation"), expected)


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
