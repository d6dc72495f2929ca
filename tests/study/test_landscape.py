"""The plane through three networks: embedding keeps the function, anchors their values."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, build, covering, outputs, same_state

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.evaluate.embed import embed, folded
from intrafuse.study.evaluate.landscape import _coarse_first, landscape
from intrafuse.study.training import Training, train
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.install import install

DATA = load_data("digits", limit=150)
METHODS = ("select", "intra-fusion", "folding", "moment")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = resolve_model("digits_resnet", width=0.5)
    settings = Training(epochs=4, batch=64, rate=0.1, schedule="one-cycle")
    train(net.model, load_data("digits", split="train"), settings)
    return net


@pytest.fixture(scope="module")
def two(trained):
    """Plan two prunings of the trained network."""
    return plans(trained)


def plans(net, methods=("select", "intra-fusion"), share=0.4):
    return {
        m: intrafuse.plan(net.model, net.example_inputs, channels=share, method=m) for m in methods
    }


@pytest.mark.parametrize(("name", "method"), covering(NETWORKS, METHODS))
def test_an_embedded_network_is_the_pruned_one_at_the_shapes_of_the_original(name, method):
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=0.5, method=method)
    weights = embed(plan, model)
    whole = folded(plan, model)
    assert {n: t.shape for n, t in whole.state.items()} == {
        n: t.shape for n, t in weights.state.items() if n in whole.state
    }
    found = outputs(install(model, weights), x)
    torch.testing.assert_close(found, outputs(plan.apply(model), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("methods", [("select", "intra-fusion"), ("folding", "moment")])
def test_the_anchors_have_their_networks_own_values(trained, methods):
    chosen = plans(trained, methods)
    state = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    found = landscape(trained.model, chosen, DATA, points=2)
    own = [trained.model, *(plan.apply(trained.model) for plan in chosen.values())]
    assert [a.value for a in found.anchors] == pytest.approx([accuracy(m, DATA) for m in own])
    assert [a.name for a in found.anchors] == ["original", *methods]
    assert (found.anchors[0].x, found.anchors[0].y, found.anchors[1].y) == (0, 0, 0)
    assert found.anchors[2].y > 0 and same_state(trained.model, state)


def test_the_loss_is_a_mean_cross_entropy(trained):
    found = landscape(trained.model, plans(trained), DATA, points=2, kind="loss")
    (images, labels), *_ = DATA.batches(150)
    expected = torch.nn.functional.cross_entropy(outputs(trained.model, images), labels)
    assert found.anchors[0].value == pytest.approx(float(expected), rel=1e-4)


def test_a_resumed_landscape_measures_nothing_twice(trained, tmp_path):
    chosen, state = plans(trained), tmp_path / "values.json"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        landscape(trained.model, chosen, DATA, points=3, state=state, progress=stop)
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _args, _out: calls.append(1) if type(module).__name__ == "ResNet" else None
    )
    try:
        again = landscape(trained.model, chosen, DATA, points=3, state=state)
        assert len(calls) == 12 - 7
        landscape(trained.model, chosen, DATA, points=3, state=state)
        assert len(calls) == 12 - 7
    finally:
        hook.remove()
    assert again == landscape(trained.model, chosen, DATA, points=3)

    with pytest.raises(IntrafuseError, match="another landscape"):
        landscape(trained.model, chosen, DATA, points=2, state=state)


STATES = (
    *("3", "null", '"x"', "[[]]", "[" * 100_000, "[" * 150 + "]" * 150, '{"identity": "x"}'),
    *('{"identity": null, "values": {}}', '{"identity": "x", "values": []}'),
    *(
        f'{{"identity": "x", "values": {values}}}'
        for values in (
            *('null, "more": 1', '{"0 0": NaN}', '{"0 0": Infinity}', '{"0 0": 1e999}'),
            *('{"0 0": "5"}', '{"0 0": null}', '{"0 0": [1]}', '{"0 0": true}', '{"0 0": -1}'),
            *('{"q": 1}', '{"0 0": 1, "0 0": 2}', '{"anchor 0": 1' + "0" * 400 + "}", '{"": 1}'),
        )
    ),
)


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "cost"}', *STATES])
def test_a_file_that_is_no_state_is_left_alone(trained, two, tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(IntrafuseError, match="state of a landscape cannot be read"):
        landscape(trained.model, two, DATA, points=2, state=path)
    assert path.read_text() == content


def test_numbers_that_are_not_finite_are_refused(trained, two):
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        model.linear.weight.fill_(3e38)
    with pytest.raises(IntrafuseError, match="not finite"):
        landscape(model, two, DATA, points=2)


@pytest.mark.parametrize("points", [2, 3, 8, 21])
def test_every_cell_is_visited_once_and_corners_of_coarse_grids_first(points):
    order = list(_coarse_first(points))
    assert len(order) == len(set(order)) == points**2 and order[0] == (0, 0)
    if points == 21:
        assert set(order[:4]) == {(0, 0), (0, 16), (16, 0), (16, 16)}


def test_three_networks_on_a_line_and_wrong_grids_are_refused(trained):
    same = plans(trained, ("select",))["select"]
    with pytest.raises(IntrafuseError, match="one line"):
        landscape(trained.model, {"a": same, "b": same}, DATA, points=2)
    with pytest.raises(IntrafuseError, match="two plans"):
        landscape(trained.model, {"a": same}, DATA)
    with pytest.raises(IntrafuseError, match="two plans"):
        landscape(trained.model, plans(trained), DATA, points=1)
