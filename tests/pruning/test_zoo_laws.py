"""Laws for every network of the zoo: planned shapes, reloading bit for bit, nothing removed."""

from __future__ import annotations

import pytest
import torch
from networks import FAMILIES

import intrafuse
from intrafuse.catalog.zoo import ResolvedModel, resolve_model


@pytest.fixture(scope="module", params=FAMILIES)
def network(request) -> ResolvedModel:
    torch.manual_seed(0)
    resolved = (
        resolve_model(request.param, width=0.5)
        if request.param != "mlp"
        else (resolve_model("mlp"))
    )
    for module in resolved.model.modules():  # statistics of a trained network, not of a new one
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return resolved


def images(network: ResolvedModel) -> torch.Tensor:
    return torch.randn(2, *network.example_inputs[0].shape[1:])


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_result_has_the_planned_shapes_and_runs(network, share):
    plan = intrafuse.plan(network.model, network.example_inputs, channels=share)
    pruned = plan.apply(network.model)
    shapes = plan.shapes()
    for name, tensor in pruned.state_dict().items():
        assert tuple(tensor.shape) == shapes[name]
    for group in plan.graph.groups:
        assert plan.widths[group.name] == max(1, int(group.size * (1 - share) + 1e-9))
    found = sum(p.numel() for p in pruned.parameters())
    assert found == plan.after.params
    output = pruned.train()(images(network))
    output.sum().backward()
    assert torch.isfinite(output).all()


def test_removing_nothing_changes_nothing(network):
    pruned = intrafuse.prune(network.model, network.example_inputs, channels=0.0).model
    x = images(network)
    with torch.inference_mode():
        assert torch.equal(pruned.eval()(x), network.model.eval()(x))


def test_saving_and_loading_reproduces_outputs_bit_for_bit(network, tmp_path):
    pruned = intrafuse.prune(network.model, network.example_inputs, channels=0.9)
    saved = dict(architecture=network.name, arguments=network.arguments)
    intrafuse.save(tmp_path / "net", pruned, **saved)
    x = images(network)
    with torch.inference_mode():
        expected = pruned.model.eval()(x)
        assert torch.equal(intrafuse.load(tmp_path / "net")(x), expected)
        own = resolve_model(network.name, **network.arguments).model
        assert torch.equal(intrafuse.load(tmp_path / "net", model=own)(x), expected)


def test_folding_batch_norm_keeps_the_outputs(network):
    x = images(network)
    with torch.inference_mode():
        expected = network.model.eval()(x)
        folded = intrafuse.fold_batchnorm(network.model, network.example_inputs).eval()(x)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
