"""Sensitivity of groups, and ablations with the Kruskal-Wallis test."""

from __future__ import annotations

import pytest
import torch

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.evaluate.ablation import (
    MARGINALS,
    NORMALISATIONS,
    ORDERS,
    TARGETS,
    Ablation,
    ablation,
)
from intrafuse.study.evaluate.sensitivity import sensitivity
from intrafuse.support.errors import IntrafuseError

DATA = load_data("digits", limit=100)


def network():
    torch.manual_seed(0)
    return resolve_model("mlp")


def test_every_group_is_pruned_alone():
    net = network()
    seen = []
    found = sensitivity(
        net.model,
        net.example_inputs,
        DATA,
        shares=(0.0, 0.5),
        methods=("select", "moment"),
        progress=lambda done, total: seen.append((done, total)),
    )
    groups = [g.name for g in intrafuse.trace(net.model, net.example_inputs).groups]
    assert [(r.group, r.method) for r in found.rows] == [
        (g, m) for g in groups for m in ("select", "moment")
    ]
    assert seen[-1] == (9, 9) and found.original == accuracy(net.model, DATA)
    for row in found.rows:
        assert row.accuracies[0] == pytest.approx(found.original)
    last = found.rows[-2]
    pruned = intrafuse.prune(
        net.model, net.example_inputs, channels=0.5, method="select", include=[last.group]
    )
    assert last.accuracies[1] == accuracy(pruned.model, DATA)
    ranking = found.ranking("select")
    assert [drop for _, drop in ranking] == sorted((d for _, d in ranking), reverse=True)


def test_kruskal_wallis_by_hand():
    """Ranks 1 2 3 and 4 5 6: H = 12 / (6 * 7) * (6^2 / 3 + 15^2 / 3) - 3 * 7 = 27 / 7."""
    found = Ablation.of({"a": [1, 2, 3], "b": [4, 5, 6]})
    assert found.statistic == pytest.approx(27 / 7) and found.p_value == pytest.approx(
        0.0495, abs=1e-4
    )


def test_equal_samples_do_not_differ():
    found = Ablation.of({"a": [5, 5], "b": [5, 5]})
    assert (found.statistic, found.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("settings", [MARGINALS, TARGETS, ORDERS, NORMALISATIONS])
def test_the_papers_settings_run(settings):
    net = network()
    found = ablation(net.model, net.example_inputs, DATA, settings, shares=(0.5,))
    assert list(found.accuracies) == list(settings)
    assert {len(values) for values in found.accuracies.values()} == {2}
    assert 0 <= found.p_value <= 1


def test_names_of_marginals_are_the_papers():
    assert list(MARGINALS) == ["uTuS", "uTiS", "iTuS", "iTiS"]
    method = MARGINALS["uTiS"]["method"]
    assert (method.target_marginal, method.source_marginal) == ("uniform", "importance")


def test_one_setting_is_no_ablation():
    net = network()
    with pytest.raises(IntrafuseError, match="two settings"):
        ablation(net.model, net.example_inputs, DATA, {"a": {}})
