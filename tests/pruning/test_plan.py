"""A plan decides and changes nothing; applying it gives the network that it foretold."""

import copy
from functools import cache

import pytest
import torch
from networks import NETWORKS, build, covering, outputs, same_state
from torch import nn

import intrafuse
from intrafuse import IntrafuseError, MergeMap, Plan
from intrafuse.methods import IntraFusion

METHODS = ["select", "intra-fusion"]
SHARES = [0.1, 0.5, 0.9]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@cache
def planned(name, method, share):
    """Plan once for all tests: they change copies only."""
    model, x = build(name)
    return model, x, intrafuse.plan(model, x, channels=share, method=method)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_attributes(model):
    """Compare what modules say of themselves with the tensors that they hold."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
        elif isinstance(module, TRANSPOSED):
            shape = (module.in_channels, module.out_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert len(module.running_mean) == len(module.running_var) == module.num_features
        elif isinstance(module, nn.PReLU):
            assert len(module.weight) == module.num_parameters
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
            assert module.num_channels % module.num_groups == 0
        bias = getattr(module, "bias", None)
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and bias is not None:
            assert len(bias) == module.out_channels


# --- every network, method and share


@pytest.mark.parametrize(("name", "share"), covering(NETWORKS, SHARES))
def test_the_pruned_network_is_what_the_plan_foretold(name, share):
    model, x, plan = planned(name, "intra-fusion", share)
    small = plan.apply(model)
    shapes = plan.shapes()
    for key, tensor in tensors(small).items():
        assert tuple(tensor.shape) == shapes.get(key, tuple(tensor.shape))
    check_attributes(small)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    for group in plan.graph.groups:
        assert plan.widths[group.name] == max(1, int(group.size * (1 - share) + 1e-9))
    result = small.train()(x)
    assert torch.isfinite(result).all() and result.shape == model(x).shape
    result.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters())
    twin = plan.apply(build(name, seed=1)[0])
    twin.load_state_dict(small.state_dict(), strict=True)
    for other in (copy.deepcopy(small), twin):
        torch.testing.assert_close(outputs(other, x), outputs(small, x), atol=0, rtol=0)


@pytest.mark.parametrize(("name", "method"), covering(["residual", "flat", "grouped"], METHODS))
def test_one_trace_serves_several_plans(name, method):
    model, x = build(name)
    graph = intrafuse.trace(model, x)
    for share in (0.3, 0.6):
        wanted = intrafuse.prune(model, x, channels=share, method=method)
        found = intrafuse.prune(model, graph, channels=share, method=method)
        assert found.plan.graph is graph and found.report.check is not None
        assert same_state(found.model, wanted.model.state_dict())


def test_a_trace_of_another_network_is_refused():
    (model, x), (other, _) = build("residual"), build("flat")
    with pytest.raises(IntrafuseError, match="the model"):
        intrafuse.plan(other, intrafuse.trace(model, x), channels=0.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pruned_network_compiles(name):
    model, x, plan = planned(name, "intra-fusion", 0.5)
    small = plan.apply(model)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, x), outputs(small, x), atol=0, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_nothing_changes_nothing(name):
    model, x = build(name)
    for budget in {"channels": 0}, {"macs": 0.0, "scope": "global"}:
        pruned = intrafuse.prune(model, x, **budget)
        assert pruned.model is not model and same_state(pruned.model, model.state_dict())
        assert pruned.report.before == pruned.report.after
        assert set(pruned.report.reached.values()) == {0}
        assert torch.equal(outputs(pruned.model, x), outputs(model, x))


def test_ties_stay_tied():
    model, _, plan = planned("tied", "intra-fusion", 0.5)
    assert plan.widths == {"enter": 4}
    for small in (plan.apply(model), plan.apply(copy.deepcopy(model), inplace=True)):
        assert small.first.weight is small.second.weight
        assert tuple(small.first.weight.shape) == (4, 4)


# --- planning leaves no trace


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["chain", "residual", "twice", "tied"])
def test_planning_and_copying_leave_the_model_alone(name, method):
    model, x = build(name)
    model.train()
    next(model.modules()).eval()  # a mixture of modes
    next(model.parameters()).requires_grad_(False)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    identities = {k: id(t) for k, t in tensors(model).items()}
    modes = [module.training for module in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    before = str(model)
    intrafuse.plan(model, x, channels=0.5, method=method).apply(model)
    assert same_state(model, state) and str(model) == before
    assert {k: id(t) for k, t in tensors(model).items()} == identities
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_shares_no_memory_with_the_model(name, method):
    model, _, plan = planned(name, method, 0.5)
    old = {t.data_ptr() for t in tensors(model).values()}
    assert not old & {t.data_ptr() for t in tensors(plan.apply(model)).values()}


@pytest.mark.parametrize("method", METHODS)
def test_in_place_is_the_same_as_on_a_copy(method):
    model, x, plan = planned("residual", method, 0.5)
    mine = copy.deepcopy(model)
    assert plan.apply(mine, inplace=True) is mine
    assert same_state(mine, plan.apply(model).state_dict())
    check_attributes(mine)
    pruned = intrafuse.prune(copy.deepcopy(model), x, channels=0.5, method=method, inplace=True)
    assert same_state(pruned.model, mine.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_modes_and_gradient_flags_pass_to_the_copy(method):
    model, x = build("residual")
    model.train()
    model.bn1.eval()
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    small = intrafuse.prune(model, x, channels=0.5, method=method).model
    assert small.training and small.conv1.training and not small.bn1.training
    assert {n for n, p in small.named_parameters() if not p.requires_grad} >= {"stem.weight"}
    assert all(p.requires_grad for n, p in small.named_parameters() if "stem" not in n)
    assert all(not p.requires_grad for n, p in small.named_parameters() if "stem" in n)
    assert all(p.is_leaf for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_type_of_numbers_stays(method, dtype):
    model, x = build("residual")
    expected = outputs(intrafuse.prune(model, x, channels=0.5, method=method).model, x)
    model, x = model.to(dtype), x.to(dtype)
    small = intrafuse.prune(model, x, channels=0.5, method=method).model
    assert {t.dtype for t in small.state_dict().values()} == {dtype, torch.int64}
    result = outputs(small, x)
    assert torch.isfinite(result).all()
    if dtype == torch.float64:  # the same channels are chosen, up to ties
        torch.testing.assert_close(result.float(), expected, atol=1e-4, rtol=1e-4)


# --- which groups


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped"])
def test_one_group_alone_and_a_list_of_groups(name, method):
    model, x, whole = planned(name, method, 0.5)
    names = [group.name for group in whole.graph.groups]
    for include in (names[:1], names[-1:], names[:2]):
        plan = intrafuse.plan(model, x, channels=0.5, method=method, include=include)
        assert {step.group for step in plan.maps} == set(include)
        for group in plan.graph.groups:
            kept = plan.widths[group.name]
            assert kept == (whole.widths[group.name] if group.name in include else group.size)
        assert torch.isfinite(outputs(plan.apply(model), x)).all()
    rest = intrafuse.plan(model, x, channels=0.5, method=method, exclude=names[1:])
    assert [step.group for step in rest.maps] == names[:1]


def test_patterns_name_groups_layers_modules_and_globs():
    model, x = build("residual")

    def kept(**choice):
        plan = intrafuse.plan(model, x, channels=0.5, method="select", **choice)
        return {step.group for step in plan.maps}

    assert kept() == {"stem", "conv1", "conv2"}
    assert kept(include=["conv?"]) == {"conv1", "conv2"}
    assert kept(include=["short"]) == kept(include=["short.0"]) == {"conv2"}
    assert kept(exclude=["conv*"]) == {"stem"}
    assert kept(include=["conv*"], exclude=["conv1"]) == {"conv2"}
    assert kept(exclude=["head", "stem"]) == {"conv1", "conv2"}


@pytest.mark.parametrize("method", METHODS)
def test_an_excluded_layer_keeps_its_weights(method):
    model, x = build("flat")
    small = intrafuse.prune(model, x, channels=0.5, method=method, include=["5"]).model
    assert torch.equal(small[8].bias, model[8].bias)
    plan = intrafuse.plan(model, x, channels=0.5, method="select", include=["5"])
    assert torch.equal(plan.apply(model)[0].weight, model[0].weight)


def test_groups_are_listed_from_the_input_and_indexed_from_the_output():
    _, _, plan = planned("chain", "select", 0.5)
    assert [(g.name, g.index) for g in plan.graph.groups] == [("0", 2), ("3", 1), ("6", 0)]


def test_progress_counts_to_the_number_of_groups():
    model, x = build("chain")
    seen = []
    intrafuse.plan(model, x, channels=0.5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_same_call_gives_the_same_plan():
    model, x = build("residual")
    method = IntraFusion(target="k-means")
    first, second = (intrafuse.plan(model, x, channels=0.5, method=method) for _ in "ab")
    assert same_state(first.apply(model), second.apply(model).state_dict())


# --- printing and files


@pytest.mark.parametrize("name", NETWORKS)
def test_printing_names_every_group(name):
    _, _, plan = planned(name, "intra-fusion", 0.5)
    lines = str(plan).splitlines()
    for group in plan.graph.groups:
        words = [str(group.index), group.name, str(group.size), str(plan.widths[group.name])]
        assert any(
            [w for w in line.split() if w.isalnum() or "#" in w][:4] == words for line in lines
        )
    assert f"params {plan.before.params:,} -> {plan.after.params:,}" in lines[-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_that_was_saved_does_the_same(name, method, tmp_path):
    model, x, plan = planned(name, method, 0.5)
    plan.save(tmp_path / "new" / "plan.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.safetensors"]
    loaded = Plan.load(tmp_path / "new" / "plan.safetensors")
    small, expected = loaded.apply(build(name)[0]), plan.apply(model)
    assert same_state(small, expected.state_dict())
    check_attributes(small)
    assert torch.equal(outputs(small, x), outputs(expected, x))
    for part in ("widths", "removed", "fold", "settings", "before", "after", "seconds"):
        assert getattr(loaded, part) == getattr(plan, part)
    assert loaded.shapes() == plan.shapes() and str(loaded) == str(plan)


def test_an_empty_plan_can_be_saved(tmp_path):
    model, x = build("mlp")
    intrafuse.plan(model, x, channels=0).save(tmp_path / "plan")
    assert same_state(Plan.load(tmp_path / "plan").apply(model), model.state_dict())


@pytest.mark.parametrize("share", [0, 0.2, 0.9, 0.999])
def test_a_plan_that_was_cut_short_is_refused(share, tmp_path):
    path = tmp_path / "plan"
    planned("mlp", "intra-fusion", 0.5)[2].save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(IntrafuseError, match=r"readable safetensors file.*make the plan again"):
        Plan.load(path)


def test_a_plan_for_other_shapes_is_refused():
    model, _, plan = planned("chain", "select", 0.5)
    wide = copy.deepcopy(model)
    wide[3] = nn.Conv2d(8, 14, 3, bias=False)
    state = {k: t.clone() for k, t in wide.state_dict().items()}
    with pytest.raises(IntrafuseError, match=r"shapes that the plan was made for .*3\.weight"):
        plan.apply(wide, inplace=True)
    assert same_state(wide, state)
    short = nn.Sequential(*list(copy.deepcopy(model))[:6])
    with pytest.raises(IntrafuseError, match=r"lacks parameters .*\['10.weight', '6.weight'\]"):
        plan.apply(short, inplace=True)


def test_maps_keep_what_they_are_told():
    step = MergeMap.select("g", 4, torch.tensor([3, 1]))
    assert step.keep.tolist() == [1, 3] and (step.size, step.width) == (4, 2)
    torch.testing.assert_close(step.decode, step.encode.T)
    again = MergeMap.from_tensors("g", step.tensors())
    assert again.keep.tolist() == [1, 3] and torch.equal(again.encode, step.encode)


def test_channels_last_stays():
    model, x = build("residual")
    expected = outputs(intrafuse.prune(model, x, channels=0.5).model, x)
    model = model.to(memory_format=torch.channels_last)
    small = intrafuse.prune(model, x, channels=0.5).model
    assert small.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs(small, x), expected, atol=1e-5, rtol=1e-5)


def test_a_pruned_network_can_be_pruned_again():
    model, x = build("residual")
    small = intrafuse.prune(model, x, channels=0.5).model
    smaller = intrafuse.prune(small, x, channels=0.5)
    assert smaller.plan.widths == {"stem": 2, "conv1": 2, "conv2": 2}
    assert torch.isfinite(outputs(smaller.model, x)).all()


def test_settings_that_are_no_json_are_saved_in_words(tmp_path):
    model, x = build("mlp")
    plan = intrafuse.plan(model, x, channels=0.5, method=IntraFusion(p=float("inf")))
    plan.settings["method"]["callable"] = len
    plan.save(tmp_path / "plan")
    settings = Plan.load(tmp_path / "plan").settings["method"]
    assert settings["p"] == float("inf") and "len" in settings["callable"]


@pytest.mark.parametrize("form", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_in_every_form(form):
    model, x = build("residual")
    assert intrafuse.plan(model, form(x), channels=0.5).after == (
        planned("residual", "intra-fusion", 0.5)[2].after
    )


def test_a_loaded_plan_says_that_it_does_not_know_the_operators(tmp_path):
    model, x = build("chain")
    made = intrafuse.plan(model, x, channels=0.5)
    made.save(tmp_path / "plan.safetensors")
    graph = Plan.load(tmp_path / "plan.safetensors").graph
    assert graph.traced is None and made.graph.program.example_inputs is x
    with pytest.raises(IntrafuseError, match=r"does not know the operators.*make the plan again"):
        _ = graph.program


class Keeping(nn.Module):
    """Keeps what it computes from a parameter until its mode is set, as attention of timm does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.rand(8))
        self.kept = {}

    def train(self, mode=True):
        self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.c(self.b(self.a(x)) * self.scale.exp())
        if "scale" not in self.kept:
            self.kept["scale"] = self.scale.exp()
        return self.c(self.b(self.a(x)) * self.kept["scale"])


@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_module_keeps_between_calls_goes_with_its_parameters(inplace):
    x = torch.randn(3, 4)
    model = Keeping().eval()
    model.b.train()
    with torch.no_grad():
        model(x)
    pruned = intrafuse.prune(model, x, channels=0.5, method="select", inplace=inplace).model
    assert pruned(x).shape == (3, 2)  # no mode was set since
    assert pruned.b.training and not pruned.training
    assert inplace or len(model.kept["scale"]) == 8
