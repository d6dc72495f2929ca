"""Hugging Face models: pruned by `select` they equal their masked references, and are built again.

Heads and widths of attention, hidden units, grouped queries, tied weights, several inputs; the
fields of a configuration where it can say the sizes, and `intrafuse.load` where it cannot.
"""

from __future__ import annotations

import pytest
import torch
from reference import mask_channels
from typer.testing import CliRunner

import intrafuse
from intrafuse.catalog.zoo import resolve_model
from intrafuse.cli import app
from intrafuse.graph import trace

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from language_models import MODELS, build, inputs, outputs

# What is prunable in each: heads, widths inside heads, and all else.
GROUPS = {
    "bert": (2, 2, 2), "vit": (2, 2, 2), "swin": (4, 4, 4), "gpt2": (2, 2, 2),
    "llama": (2, 1, 2), "qwen3": (2, 0, 2), "t5": (3, 6, 4), "whisper": (6, 6, 5),
}  # fmt: skip
ATTENTION = ["*#heads", "*#width"]
GROUPED = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
# What a configuration can say, once these are left alone, and the fields that change then: one
# model of each way to say it.
SAYS = {
    "distilbert": (ATTENTION, {"hidden_dim": 24}),
    "deit": (ATTENTION, {"intermediate_size": 24}),
    "swin": (ATTENTION, {"mlp_ratio": 2.0}),
    "gpt2": (ATTENTION, {"n_inner": 24}),
    "whisper": ([*ATTENTION, "*conv1"], {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}),
    "t5": ([], {"d_kv": 4, "d_ff": 24, "num_heads": 2}),
    "llama": (["*#width"], GROUPED),
    "mixtral": (["*#width"], {**GROUPED, "head_dim": 8}),  # or it would be 32 / 2
}


def half(name: str, **settings):
    model = build(name)
    return model, intrafuse.prune(model, inputs(name), channels=0.5, method="select", **settings)


# What the others do, one of these does too; `benchmarks/zoo.py` runs them all.
SAMPLE = ["bert", "swin", "gpt2", "qwen3", "t5"]


@pytest.mark.parametrize("name", SAMPLE)
def test_half_of_everything_equals_the_masked_reference(name):
    model, result = half(name)
    names = [group.name for group in result.plan.graph.groups]
    kinds = [sum(f"#{kind}" in name for name in names) for kind in ("heads", "width")]
    assert (*kinds, len(names) - sum(kinds)) == GROUPS[name]
    expected = outputs(mask_channels(model, result.plan), inputs(name))
    for found, wanted in zip(outputs(result.model, inputs(name)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    sum(tensor.sum() for tensor in _live(result.model, name)).backward()
    used = [p for p in result.model.parameters() if p.grad is not None]
    assert used and all(torch.isfinite(p.grad).all() for p in used)


def _live(model, name):
    given = model(**inputs(name))
    return [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]


@pytest.mark.parametrize("name", SAYS)
def test_a_configuration_that_can_say_the_sizes_gives_the_network_again(name, tmp_path):
    exclude, fields = SAYS[name]
    model, result = half(name, exclude=exclude)
    old, new = model.config.to_dict(), result.model.config.to_dict()
    assert {key: new[key] for key in new if new[key] != old.get(key)} == fields
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for found, wanted in zip(
        outputs(again, inputs(name)), outputs(result.model, inputs(name)), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "qwen3"])
def test_half_of_the_width_as_well_equals_the_masked_reference(name):
    model, batch = build(name), inputs(name)
    plan = intrafuse.plan(model, batch, channels=0.5, method="select", include=["*"])
    assert any(name.endswith("#normed") for name in plan.widths)
    found = intrafuse.verify(model, plan)
    assert found.relative < 1e-4 < found.effect


@pytest.mark.parametrize(
    ("name", "include"), [("llama", ["*#normed"]), ("gpt2", ["*#normed", "*#heads"])]
)
def test_a_configuration_says_the_width(name, include, tmp_path):
    model, batch = build(name), inputs(name)
    result = intrafuse.prune(model, batch, channels=0.5, method="select", include=include)
    intrafuse.save(tmp_path / "folder", result)
    loaded = intrafuse.load(tmp_path / "folder", model=build(name, seed=5))
    for small, folder in ((result.model, tmp_path / "pruned"), (loaded, tmp_path / "loaded")):
        assert small.config.hidden_size == 16
        small.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        for one, other in zip(outputs(result.model, batch), outputs(again, batch), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_what_a_configuration_cannot_say_is_refused_by_it_and_loaded_by_intrafuse(name, tmp_path):
    model, result = half(name)
    result.model.save_pretrained(tmp_path / "hf")
    with pytest.raises(RuntimeError):  # shapes that the configuration does not give
        type(model).from_pretrained(tmp_path / "hf")
    intrafuse.save(tmp_path / "folder", result)
    again = intrafuse.load(tmp_path / "folder", model=build(name, seed=5))
    for found, wanted in zip(
        outputs(again, inputs(name)), outputs(result.model, inputs(name)), strict=True
    ):
        assert torch.equal(found, wanted)


def test_layers_that_differ_leave_the_configuration_alone(tmp_path):
    model = build("llama")
    overrides = {"model.layers.0.mlp.gate_proj": 0.25}
    result = intrafuse.prune(
        model, inputs("llama"), channels=0.5, method="select", overrides=overrides,
        exclude=["*#width", "*#heads"],
    )  # fmt: skip
    assert set(result.plan.widths.values()) >= {36, 24}
    intrafuse.save(tmp_path / "folder", result)
    again = intrafuse.load(tmp_path / "folder", model=build("llama", seed=5))
    assert torch.equal(
        outputs(again, inputs("llama"))[0], outputs(result.model, inputs("llama"))[0]
    )


def test_rotated_widths_are_one_group_of_pairs_in_all_layers():
    graph = trace(build("llama"), inputs("llama"))
    (width,) = (group for group in graph.groups if group.name.endswith("#width"))
    assert width.size == 4  # pairs i and i + 4 of 8
    layers = {slot.layer for slot in width.slots}
    assert {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"} <= layers
    assert "model.rotary_emb" in layers  # its frequencies go with their pairs


def test_key_value_heads_go_with_their_query_heads():
    graph = trace(build("llama"), inputs("llama"))
    heads = graph.by_name["model.layers.0.self_attn.q_proj#heads"]
    rows = {slot.parameter.split(".")[-2]: slot.blocks for slot in heads.slots}
    assert heads.size == 2
    own, shared = rows["k_proj"][0], rows["q_proj"][0]
    assert shared.inner == 2 * own.inner  # positions of one head, and of the two that share it


def test_tied_embeddings_stay_one_parameter():
    _, result = half("gpt2")
    assert result.model.lm_head.weight is result.model.transformer.wte.weight


def test_a_cache_is_of_the_pruned_size():
    model, result = half("llama")
    cache = result.model(**inputs("llama"), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 1, 8, 4)  # one of two heads, four of eight channels
    assert model.config.use_cache


def test_inputs_may_be_positional_and_several():
    model = build("bert")
    tokens = inputs("bert")["input_ids"]
    mask = torch.ones_like(tokens)
    one = trace(model, (tokens, mask))
    two = trace(model, {"input_ids": tokens, "attention_mask": mask, "return_dict": False})
    assert one.widths == two.widths


@pytest.mark.parametrize("method", ["intra-fusion", "folding", "moment"])
def test_merging_methods_run(method):
    model = build("llama")
    result = intrafuse.prune(model, inputs("llama"), channels=0.5, method=method)
    assert all(torch.isfinite(t).all() for t in outputs(result.model, inputs("llama")))
    merged = {step.group: step.keep is None for step in result.plan.maps}
    assert merged["model.layers.0.mlp.gate_proj"]
    assert not any(merge for name, merge in merged.items() if "#" in name)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper"])
def test_a_local_folder_is_a_model_of_the_command_line(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    resolved = resolve_model(f"hf:{tmp_path / 'model'}")
    assert type(resolved.model).__name__ == MODELS[name][0]
    state = build(name).state_dict()
    assert all(torch.equal(t, state[k]) for k, t in resolved.model.state_dict().items())
    graph = trace(resolved.model, resolved.example_inputs)
    assert len(graph.groups) == sum(GROUPS[name])


def test_pruning_a_folder_on_the_command_line(tmp_path):
    build("bert").save_pretrained(tmp_path / "model")
    arguments = ["prune", f"hf:{tmp_path / 'model'}", "--channels", "0.5", "--method", "select"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "small")])
    assert result.exit_code == 0, result.output
    small = intrafuse.load(tmp_path / "small", model=build("bert", seed=7))
    assert small.encoder.layer[0].intermediate.dense.out_features == 24
