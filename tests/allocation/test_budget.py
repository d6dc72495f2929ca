"""Budgets: known widths, least removal that suffices, counts that agree with real networks."""

import re
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, build, covering
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import intrafuse
from intrafuse import Budget, IntrafuseError
from intrafuse.allocation.budget import choose_widths, measure
from intrafuse.surgery.weights import Weights

SIZES = (2, 3, 7, 8, 10, 20, 100)


@cache
def tower():
    """A perceptron with hidden layers of many sizes: `0`, `1`, ... are its groups."""
    sizes = (4, *SIZES, 5)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    graph = intrafuse.trace(model, torch.zeros(1, 4))
    counted = Weights.of(graph, model).counted()
    return graph, lambda widths: measure(graph, graph.resized(widths), counted)


def widths_of(scores=None, groups=None, **settings):
    graph, figures = tower()
    chosen = [g for g in graph.groups if groups is None or g.name in groups]
    amount = lambda widths: getattr(figures(widths), settings["kind"])  # noqa: E731
    found = choose_widths(graph, chosen, scores or {}, Budget(**settings), amount)
    return [found[group.name] for group in chosen]


def removed(widths, kind):
    graph, figures = tower()
    names = [group.name for group in graph.groups]
    return figures(dict(zip(names, widths, strict=True))).removed(figures({}))[kind]


# --- shares of channels


@pytest.mark.parametrize(
    ("share", "widths"),
    [
        (0, [2, 3, 7, 8, 10, 20, 100]),
        (0.0001, [1, 2, 6, 7, 9, 19, 99]),
        (0.1, [1, 2, 6, 7, 9, 18, 90]),
        (0.29, [1, 2, 4, 5, 7, 14, 71]),
        (0.3, [1, 2, 4, 5, 7, 14, 70]),
        (0.5, [1, 1, 3, 4, 5, 10, 50]),
        (0.7, [1, 1, 2, 2, 3, 6, 30]),
        (0.9, [1, 1, 1, 1, 1, 2, 10]),
        (0.9999, [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_known_widths(share, widths):
    assert widths_of(kind="channels", share=share) == widths


@given(st.integers(1, 100))
def test_a_whole_number_of_channels_is_removed_exactly(count):
    assert widths_of(kind="channels", share=(count - 1) / 100)[-1] == 101 - count


@pytest.mark.parametrize(
    ("share", "multiple", "widths"),
    [
        (0, 8, [2, 3, 7, 8, 10, 20, 100]),  # what is not removed need not be a multiple
        (0.1, 8, [2, 3, 7, 8, 8, 16, 88]),  # groups below the multiple stay
        (0.5, 8, [2, 3, 7, 8, 8, 8, 48]),
        (0.99, 8, [2, 3, 7, 8, 8, 8, 8]),
        (0.5, 3, [2, 3, 3, 3, 3, 9, 48]),
        (0.5, 1000, [2, 3, 7, 8, 10, 20, 100]),
    ],
)
def test_widths_are_rounded_down_to_multiples(share, multiple, widths):
    assert widths_of(kind="channels", share=share, round_to=multiple) == widths


def test_groups_of_one_channel_are_locked():
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    plan = intrafuse.plan(model, torch.zeros(1, 4), channels=0.5, method="select")
    assert plan.widths == {"2": 1}
    assert "a single channel" in str([group.locked for group in plan.graph.locked])


# --- shares of parameters and of multiply-accumulates


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.5, 0.77, 0.95])
def test_a_uniform_budget_removes_least_of_what_suffices(kind, share, multiple):
    """Against brute force over every share of channels that makes a difference."""
    found = widths_of(kind=kind, share=share, round_to=multiple)
    shares = sorted({k / n for n in SIZES for k in range(n)})
    ladder = [widths_of(kind="channels", share=s, round_to=multiple) for s in shares]
    enough = [removed(w, kind) for w in ladder if removed(w, kind) >= share - 1e-12]
    if enough:
        assert found in ladder and removed(found, kind) == min(enough)


def scores_of(seed=0):
    """Draw scores on a scale of its own for each group."""
    generator = torch.Generator().manual_seed(seed)
    graph, _ = tower()
    return {
        g.name: torch.rand(g.size, generator=generator) * 10**i for i, g in enumerate(graph.groups)
    }


def ranked(scores, floor):
    """Remove channels one by one, lowest share of its group's mean score first: all widths."""
    widths = {name: len(score) for name, score in scores.items()}
    least = {name: max(1, -(-round(len(s) * floor * 1000) // 1000)) for name, s in scores.items()}
    queue = []
    for name, score in scores.items():
        relative = (score.double() / score.double().mean()).sort().values
        queue += [(value, name) for value in relative[: len(score) - least[name]].tolist()]
    found = [list(widths.values())]
    for _, name in sorted(queue):
        widths[name] -= 1
        found.append(list(widths.values()))
    return found


@pytest.mark.parametrize("floor", [0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize("share", [0, 0.01, 0.25, 0.45])
def test_a_global_budget_ranks_all_channels_together(kind, share, floor):
    scores = scores_of()
    found = widths_of(scores, kind=kind, share=share, scope="global", floor=floor)
    ladder = ranked(scores, floor)
    assert found == next(w for w in ladder if removed(w, kind) >= share - 1e-12)
    assert all(w >= max(1, floor * n - 1e-9) for w, n in zip(found, SIZES, strict=True))


def test_a_global_budget_does_not_see_the_scale_of_a_group():
    one, other = scores_of(), {name: 3 * score for name, score in scores_of().items()}
    settings = {"kind": "params", "share": 0.4, "scope": "global"}
    assert widths_of(one, **settings) == widths_of(other, **settings)


@pytest.mark.parametrize("multiple", [3, 4, 8])
def test_rounding_does_not_undercut_the_floor(multiple):
    for share in (0.1, 0.25, 0.35):
        settings = {"scope": "global", "floor": 0.45, "round_to": multiple}
        found = widths_of(scores_of(), kind="channels", share=share, **settings)
        for width, n in zip(found, SIZES, strict=True):
            assert width == n or (width >= 0.45 * n and width % multiple == 0)


def test_equal_scores_remove_equal_shares_of_equal_groups():
    model, x = build("residual")
    flat = lambda group, context: torch.ones(group.size)  # noqa: E731
    plan = intrafuse.plan(
        model, x, channels=0.5, scope="global", floor=0, importance=flat, method="select"
    )
    assert sum(plan.widths.values()) == 14


# --- overrides


def test_overrides_decide_for_their_groups():
    settings = {"kind": "channels", "share": 0.5}
    assert widths_of(**settings, overrides={"6": 0, "5": 0.9}) == [1, 1, 3, 4, 5, 2, 100]
    assert widths_of(**settings, overrides={"6": 0, "*": 0.9}) == [1, 1, 1, 1, 1, 2, 100]
    assert widths_of(**settings, overrides={"*": 0.9, "6": 0}) == [1, 1, 1, 1, 1, 2, 10]
    assert widths_of(**settings, overrides={"[01]": 0}) == [2, 3, 3, 4, 5, 10, 50]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_budget_counts_what_overrides_remove(scope):
    settings = {"kind": "params", "share": 0.4, "scope": scope}
    found = widths_of(scores_of(), **settings, overrides={"6": 0.25})
    assert found[-1] == 75 and removed(found, "params") >= 0.4
    everywhere = widths_of(scores_of(), **settings, overrides={"*": 0.5})
    assert everywhere == [1, 1, 3, 4, 5, 10, 50]


def test_an_override_that_matches_nothing_is_refused():
    model, x = build("residual")
    with pytest.raises(IntrafuseError, match=r"overrides matches no .*'convl'.*near matches: conv"):
        intrafuse.plan(model, x, channels=0.5, overrides={"convl": 0.1})


# --- what cannot be reached


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("settings", [{}, {"round_to": 8}, {"scope": "global", "floor": 0.5}])
def test_an_error_tells_the_most_that_can_be_removed(kind, settings):
    with pytest.raises(
        IntrafuseError, match=f"cannot shed that share of {kind}; got 0.999"
    ) as info:
        widths_of(scores_of(), kind=kind, share=0.999, **settings)
    most = float(re.search(r"at most (0\.\d+) can be removed", str(info.value))[1])
    reached = removed(widths_of(scores_of(), kind=kind, share=most, **settings), kind)
    assert most <= reached < most + 1e-4
    with pytest.raises(IntrafuseError, match="at most"):
        widths_of(scores_of(), kind=kind, share=most + 2e-4, **settings)


def test_the_floor_limits_a_global_budget_of_channels():
    settings = {"kind": "channels", "scope": "global", "floor": 0.5}
    with pytest.raises(IntrafuseError, match=r"at most 0\.49\d\d can be removed"):
        widths_of(scores_of(), share=0.6, **settings)


@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_a_network_without_prunable_groups(kind, scope):
    model, x = nn.Linear(4, 2), torch.zeros(1, 4)
    with pytest.raises(IntrafuseError, match=r"at most 0\.0000 can be removed"):
        intrafuse.plan(model, x, scope=scope, **{kind: 0.5})
    assert not intrafuse.plan(model, x, scope=scope, **{kind: 0}).maps


def test_excluding_every_group_leaves_nothing_to_remove():
    model, x = build("mlp")
    with pytest.raises(IntrafuseError, match=r"at most 0\.0000 can be removed"):
        intrafuse.plan(model, x, channels=0.5, exclude=["*"])


# --- figures


def count(model, x):
    """Count parameters, and multiply-accumulates for one sample by what the operators report."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, counter.get_total_flops() / 2 / len(x)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        # 3 x 3 over 36 positions, 3 x 3 over 4, 1 x 1 over 4, linear; each norm has 2 values
        (
            "chain",
            (27 * 8 + 8) + 16 + 72 * 12 + 24 + (120 + 10) + 55,
            36 * 27 * 8 + 4 * 72 * 12 + 4 * 120 + 50,
        ),
        # groups divide the inputs of each output; a transposed layer counts input positions
        (
            "grouped",
            (24 + 8) + 16 + 9 * 2 * 12 + 24 + (72 + 6) + 12 + (4 * 6 * 4 + 8) + 16 + 45,
            36 * 24 + 36 * 9 * 2 * 12 + 36 * 72 + 36 * 4 * 6 * 4 + 49 * 40,
        ),
        ("mlp", (72 + 12) + 24 + 108 + 50, 72 + 108 + 45),
    ],
)
def test_counts_by_hand(name, params, macs):
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=0)
    assert (plan.before.params, plan.before.macs) == (params, macs)


@pytest.mark.parametrize(("name", "kind"), covering(NETWORKS, ["params", "macs"]))
def test_figures_are_those_of_the_real_network(name, kind):
    model, x = build(name)
    pruned = intrafuse.prune(model, x, **{kind: 0.35})
    before, after = count(model, x), count(pruned.model, x)
    assert (pruned.report.before.params, pruned.report.before.macs) == before
    assert (pruned.report.after.params, pruned.report.after.macs) == after
    assert pruned.report.reached[kind] == 1 - after[kind == "macs"] / before[kind == "macs"]
    assert pruned.report.reached[kind] >= 0.35 and pruned.report.wanted == {kind: 0.35}
    assert pruned.report.after.channels == sum(pruned.plan.widths.values())
    for word in (kind, f"{pruned.report.after.params:,}", "35.0%"):
        assert word in str(pruned.report)


def test_macs_are_counted_for_one_sample():
    model, x = build("chain")
    one, four = (intrafuse.plan(model, x[:1].repeat(n, 1, 1, 1), channels=0) for n in (1, 4))
    assert one.before == four.before


def test_an_unbatched_input_is_one_sample():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    shapes = (3, 6, 6), (2, 3, 6, 6)
    plans = [intrafuse.plan(model, torch.zeros(shape), channels=0) for shape in shapes]
    assert plans[0].before == plans[1].before
    assert plans[0].before.macs == 16 * 27 * 8 + 4 * 72 * 4
