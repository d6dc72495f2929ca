"""Re-estimated batch norm: statistics that NumPy measures too, and what stays on failure."""

import copy

import numpy as np
import pytest
import torch
from networks import NETWORKS, build, outputs, same_state
from torch import nn

import intrafuse
from intrafuse import IntrafuseError
from intrafuse.pruning import repair
from intrafuse.pruning.repair import reestimate_batchnorm
from intrafuse.surgery.merged import merged_output

NORM = nn.modules.batchnorm._BatchNorm
WITH_NORMS = [name for name in NETWORKS if name != "tied"]


def batches(name, count=2, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = NETWORKS[name].shape[1:]
    return [torch.randn(size, *shape, generator=generator) + 0.5 for _ in range(count)]


def pruned(name, method, share=0.5):
    model, x = build(name)
    plan = intrafuse.plan(model, x, channels=share, method=method)
    return model, plan, plan.apply(model)


def observe(model, data, *, inputs=False):
    """Measure mean and deviation of every norm's output (or input) in evaluation mode."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, NORM):
            values = seen.setdefault(name, [])

            def hook(_, args, result, values=values):
                values.append((args[0] if inputs else result).double())

            handles.append(module.register_forward_hook(hook))
    for batch in data:
        outputs(model, batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, values in seen.items():
        line = torch.cat([value.movedim(1, 0).flatten(1) for value in values], 1)
        found[name] = (line.mean(1), line.std(1, correction=0))
    return found


# --- known answers


def numpy_statistics(model, data):
    """Run the perceptron in NumPy, norms in training mode: mean statistics of the batches."""
    weights = {k: t.double().numpy() for k, t in model.state_dict().items()}
    found = {"1": [], "4": []}
    for x in data:
        h = x.double().numpy()
        for layer, norm in (("0", "1"), ("3", "4")):
            h = h @ weights[f"{layer}.weight"].T + weights.get(f"{layer}.bias", 0)
            found[norm].append((h.mean(0), h.var(0, ddof=1)))
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
            h = h * weights.get(f"{norm}.weight", 1) + weights.get(f"{norm}.bias", 0)
            h = np.maximum(h, 0)
    return {norm: np.mean(values, axis=0) for norm, values in found.items()}


@pytest.mark.parametrize("count", [1, 3])
def test_selected_channels_get_the_statistics_that_numpy_measures(count):
    model, plan, small = pruned("mlp", "select")
    data = batches("mlp", count)
    expected = numpy_statistics(small, data)
    repaired = reestimate_batchnorm(model, small, plan, data)
    assert repaired is small
    for norm in ("1", "4"):
        mean, variance = (torch.from_numpy(part).float() for part in expected[norm])
        torch.testing.assert_close(small.get_submodule(norm).running_mean, mean)
        torch.testing.assert_close(small.get_submodule(norm).running_var, variance)
        assert small.get_submodule(norm).num_batches_tracked == count


def test_folded_channels_get_the_merged_mean_and_spread():
    """Scale and shift become deviation and mean of P z, z the original outputs of the norm."""
    model, plan, small = pruned("mlp", "intra-fusion")
    data = batches("mlp", 3)
    with torch.no_grad():
        z = model[:2](torch.cat(data))
    step = next(step for step in plan.maps if step.group == "0")
    merged = z @ step.encode.T
    reestimate_batchnorm(model, small, plan, data)
    torch.testing.assert_close(small[1].bias.data, merged.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small[1].weight.data, merged.std(0, correction=0))


@pytest.mark.parametrize(("name", "norms"), [("mlp", "14"), ("chain", "14"), ("conv3d", "14")])
def test_folded_channels_have_these_on_the_data(name, norms):
    """Also where the norm has no scale and no shift, and behind other repaired norms."""
    model, plan, small = pruned(name, "intra-fusion")
    data = batches(name, 1, 256)
    found = observe(reestimate_batchnorm(model, small, plan, data), data)
    for norm, step in zip(norms, reversed(plan.maps), strict=False):
        with torch.no_grad():
            z = model[: int(norm) + 1](data[0]).movedim(1, 0).flatten(1)
        merged = (step.encode @ z).double()
        mean, deviation = found[norm]
        torch.testing.assert_close(mean, merged.mean(1), atol=1e-3, rtol=2e-2)
        torch.testing.assert_close(deviation, merged.std(1), atol=1e-3, rtol=2e-2)


# --- laws


@pytest.mark.parametrize("name", WITH_NORMS)
def test_after_repair_norms_know_what_reaches_them(name):
    model, plan, small = pruned(name, "select")
    data = batches(name, 1, 32)

    def off(net):
        """Sum how far the running statistics are from those of the inputs."""
        total = 0.0
        for norm, (mean, deviation) in observe(net, data, inputs=True).items():
            module = net.get_submodule(norm)
            spread = module.running_var.double().sqrt()
            total += float(((module.running_mean - mean).abs() + (spread - deviation).abs()).sum())
        return total

    before = off(small)
    after = off(reestimate_batchnorm(model, small, plan, data))
    # A norm that is called twice has one pair of statistics for two kinds of input.
    assert after < (0.7 if name == "twice" else 0.05) * before


@pytest.mark.parametrize("norm", ["1", "4"])
@pytest.mark.parametrize("name", ["chain", "mlp", "conv1d", "conv3d", "autoencoder"])
def test_repair_brings_folded_statistics_closer_to_the_original_ones(name, norm):
    """The inputs of the first norm have not changed: there the merged statistics hold before."""
    model, plan, small = pruned(name, "intra-fusion", 0.6)
    data = batches(name, 2, 64)
    with torch.no_grad():
        z = model[: int(norm) + 1](torch.cat(data)).movedim(1, 0).flatten(1)
    layer = {"1": "0", "4": "3"}[norm]
    merged = next(step for step in plan.maps if step.group == layer).encode @ z
    expected = merged.mean(1), merged.std(1, correction=0)

    def off(net):
        found = observe(net, data)[norm]
        return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))

    before, after = off(small), off(reestimate_batchnorm(model, small, plan, data))
    assert after < 0.06 and (before < 1e-4 if norm == "1" else after < before / 4)


@pytest.mark.parametrize("method", ["select", "intra-fusion"])
@pytest.mark.parametrize("name", WITH_NORMS)
def test_repaired_networks_run_and_keep_their_form(name, method):
    model, plan, small = pruned(name, method)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    momenta = [m.momentum for m in model.modules() if isinstance(m, NORM)]
    shapes = {k: t.shape for k, t in small.state_dict().items()}
    data = batches(name)
    reestimate_batchnorm(model, small, plan, [(batch, torch.zeros(16)) for batch in data])
    assert {k: t.shape for k, t in small.state_dict().items()} == shapes
    assert torch.isfinite(outputs(small, data[0])).all() and same_state(model, state)
    assert [m.momentum for m in small.modules() if isinstance(m, NORM)] == momenta
    for module in (*model.modules(), *small.modules()):
        assert not module.training and not module._forward_hooks


@pytest.mark.parametrize("name", ["residual", "preactivation", "mlp", "grouped"])
def test_a_network_that_knows_its_data_is_not_changed(name):
    """Removing nothing and estimating on the data that gave the statistics changes nothing."""
    model, x = build(name)
    data = batches(name, 1, 64)
    for module in model.modules():
        if isinstance(module, NORM):
            module.train().momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(data[0])
    model.eval()
    same = intrafuse.prune(model, x, channels=0, data=data, repair="batchnorm").model
    torch.testing.assert_close(outputs(same, x), outputs(model, x))
    # Folding rewrites every norm; where no group shrinks much, little changes.
    folded = intrafuse.plan(model, x, channels=0.01, overrides={"*": 0})
    assert not folded.maps


@pytest.mark.parametrize("method", ["select", "intra-fusion"])
def test_in_place_is_the_same_as_on_a_copy(method):
    model, x = build("residual")
    settings = {"channels": 0.5, "method": method, "repair": "batchnorm"}
    data = batches("residual")
    model.train()
    model.conv1.weight.requires_grad_(False)
    copied = intrafuse.prune(model, x, data=data, **settings).model
    assert tuple(model.stem.weight.shape) == (8, 3, 3, 3)
    assert intrafuse.prune(model, x, data=data, inplace=True, **settings).model is model
    assert same_state(model, copied.state_dict())
    assert model.training and model.stem.out_channels == 4
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad
    torch.testing.assert_close(outputs(model, x), outputs(copied, x), atol=0, rtol=0)


class Configured(nn.Module):
    """A network that is built from a configuration, as those of transformers are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer, self.norm = nn.Linear(6, config.width), nn.BatchNorm1d(config.width)
        self.head = nn.Linear(config.width, 3)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)).relu())

    def save_pretrained(self, folder):
        raise NotImplementedError


class Config:
    def __init__(self, width):
        self.width = width

    def to_dict(self):
        return dict(vars(self))


@pytest.mark.parametrize("repair", ["batchnorm", "synthetic", "analytic", None])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_configuration_follows_the_sizes_whatever_is_repaired(inplace, repair):
    torch.manual_seed(0)
    model, data = Configured(Config(16)).eval(), batches("mlp")
    settings = {"channels": 0.5, "data": data, "repair": repair, "inplace": inplace}
    small = intrafuse.prune(model, data[0], **settings).model
    assert (small is model) == inplace
    assert small.layer.out_features == small.config.width == 8
    assert model.config.width == (8 if inplace else 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_numbers_stays(dtype):
    model, x = build("mlp")
    model, x = model.to(dtype), x.to(dtype)
    data = [batch.to(dtype) for batch in batches("mlp")]
    small = intrafuse.prune(model, x, channels=0.5, data=data, repair="batchnorm").model
    assert {t.dtype for t in small.state_dict().values()} == {dtype, torch.int64}


def test_batches_may_be_keyword_arguments():
    model, plan, small = pruned("mlp", "select")
    twin = copy.deepcopy(small)
    data = batches("mlp")
    reestimate_batchnorm(model, small, plan, data)
    reestimate_batchnorm(model, twin, plan, [{"input": batch} for batch in data])
    assert same_state(twin, small.state_dict())


def test_a_plan_that_was_loaded_repairs_as_well(tmp_path):
    model, plan, small = pruned("chain", "intra-fusion")
    twin = copy.deepcopy(small)
    plan.save(tmp_path / "plan")
    data = batches("chain")
    reestimate_batchnorm(model, small, plan, data)
    reestimate_batchnorm(model, twin, intrafuse.Plan.load(tmp_path / "plan"), data)
    assert same_state(twin, small.state_dict())


def by_hooks(original, plan, data):
    """Measure mean and variance of the merged outputs of norms by forward hooks."""
    found, handles = {}, []
    for norm in plan.graph.norms:

        def hook(_, args, y, norm=norm, tree=plan.graph.axes[norm.mean][0]):
            y = merged_output(plan.graph, plan.maps, tree, norm.layer, y.double())
            found.setdefault(norm.mean, []).append(y.movedim(1, -1).flatten(0, -2))

        handles.append(original.get_submodule(norm.name).register_forward_hook(hook))
    for batch in data:
        outputs(original, batch)
    for handle in handles:
        handle.remove()
    lines = {name: torch.cat(rows) for name, rows in found.items()}
    return {name: (x.mean(0), x.var(0, correction=0)) for name, x in lines.items()}


def assert_same_as_by_hooks(model, data, monkeypatch):
    plan = intrafuse.plan(model, data[0], channels=0.5, method="intra-fusion")
    small = plan.apply(model)
    twin = copy.deepcopy(small)
    found = reestimate_batchnorm(model, small, plan, data).state_dict()
    monkeypatch.setattr(repair, "_targets", by_hooks)
    wanted = reestimate_batchnorm(model, twin, plan, data).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WITH_NORMS)
def test_statistics_are_those_that_hooks_on_the_norms_measure(name, monkeypatch):
    data = [*batches(name, 2), *batches(name, 1, 11, seed=2)]
    assert_same_as_by_hooks(build(name)[0], data, monkeypatch)


class Inside(nn.Module):
    """Writes into a part of what a norm returns, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.b, self.last, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.norm(self.a(x))
        h.narrow(0, 0, 4).mul_(-3.0)
        return self.head(self.last(self.b(h)).relu())


def test_norms_behind_what_is_written_in_place_are_repaired(monkeypatch):
    torch.manual_seed(0)
    assert_same_as_by_hooks(Inside().eval(), batches("mlp"), monkeypatch)


class NormRelu(nn.BatchNorm1d):
    """A norm that goes on to an activation function, as timm's BatchNormAct2d does."""

    def forward(self, x):
        return super().forward(x).relu()


def test_a_norm_that_includes_its_activation_is_repaired_as_one_that_does_not():
    model, _ = build("mlp")
    assert isinstance(model[2], nn.ReLU) and isinstance(model[5], nn.ReLU)
    twin, data = copy.deepcopy(model), batches("mlp")
    for norm in ("1", "4"):
        twin.get_submodule(norm).__class__ = NormRelu
        twin._modules[str(int(norm) + 1)] = nn.Identity()
    settings = {"channels": 0.5, "method": "intra-fusion", "repair": "batchnorm", "data": data}
    found = [intrafuse.prune(net, data[0], **settings).model for net in (model, twin)]
    assert same_state(found[1], found[0].state_dict())


# --- failures


def failing():
    yield batches("chain")[0]
    raise OSError("the disk is gone")


class Failing:
    def __iter__(self):
        return failing()


@pytest.mark.parametrize("method", ["select", "intra-fusion"])
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Failing(), OSError, "the disk is gone"),
        ([], IntrafuseError, "data gave no batch.*a list or a loader"),
        ([torch.zeros(4, 5, 6, 6)], IntrafuseError, "refused batch 1 of the data.*channels"),
    ],
)
def test_a_failure_leaves_both_networks_as_they_were(data, error, message, method):
    model, plan, small = pruned("chain", method)
    states = [{k: t.clone() for k, t in m.state_dict().items()} for m in (model, small)]
    small.train()
    with pytest.raises(error, match=message):
        reestimate_batchnorm(model, small, plan, data, inplace=True)
    for net, state in zip((model, small), states, strict=True):
        assert same_state(net, state)
        for module in net.modules():
            assert not module._forward_hooks and module.training == (net is small)
            assert getattr(module, "momentum", 0.1) == 0.1


def test_a_generator_is_read_only_once():
    model, plan, small = pruned("mlp", "intra-fusion")
    with pytest.raises(IntrafuseError, match="not an iterator"):
        reestimate_batchnorm(model, small, plan, (batch for batch in batches("mlp")))


def test_a_batch_of_one_sample_has_no_variance():
    model, plan, small = pruned("mlp", "select")
    state = {k: t.clone() for k, t in small.state_dict().items()}
    data = [*batches("mlp"), torch.zeros(1, 6)]
    with pytest.raises(IntrafuseError, match=r"refused batch 3 .*several samples in every batch"):
        reestimate_batchnorm(model, small, plan, data)
    assert same_state(small, state)
