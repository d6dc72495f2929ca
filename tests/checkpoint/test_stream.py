"""A streamed checkpoint equals the one made in memory, wherever the run was killed."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from forks import killed
from language_models import SIZES, build, transformers

import intrafuse
from intrafuse import IntrafuseError, prune_checkpoint
from intrafuse.catalog.zoo import resolve_model
from intrafuse.checkpoint import scratch
from intrafuse.checkpoint.scratch import SCRATCH
from intrafuse.checkpoint.stored import StoredTensor
from intrafuse.methods.moment import Moment

LLAMA = {
    **SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0,
}  # fmt: skip


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


GRAPHS: dict[object, intrafuse.ChannelGraph] = {}


def traced(model: nn.Module, inputs, *, include=()) -> intrafuse.ChannelGraph:
    """Trace each kind of network once; a graph depends neither on the dtype nor on the module."""
    named = [(name, p.shape, p.device) for name, p in model.named_parameters()]
    key = *named, *include
    if key not in GRAPHS:
        GRAPHS[key] = intrafuse.trace(model, inputs, include=include)
    return GRAPHS[key]


@pytest.fixture(autouse=True)
def traced_once(monkeypatch) -> None:
    monkeypatch.setattr("intrafuse.checkpoint.source.trace", traced)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "source")


def saved(model: nn.Module, folder: Path, shard: str = "50KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def in_memory(folder: Path, **settings) -> nn.Module:
    net = resolve_model(f"hf:{folder}")
    graph = traced(net.model, net.example_inputs, include=settings.get("include", ()))
    return intrafuse.prune(net.model, graph, check=False, **settings).model


def require_equal(out: Path, model: nn.Module) -> None:
    """Compare a folder with a module, bit for bit; tied parameters are stored once."""
    found = tensors(out)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- equality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["select", "intra-fusion", "folding", "moment", "auto"])
@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_a_streamed_result_equals_the_one_in_memory(tmp_path, method, dtype, tied):
    folder = saved(llama(tied=tied, dtype=dtype), tmp_path / "source")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = prune_checkpoint(
        folder, tmp_path / "out", channels=0.4, method=method, shard_size="30KB"
    )
    model = in_memory(folder, channels=0.4, method=method)
    require_equal(tmp_path / "out", model)
    assert made.after.params == sum(p.numel() for p in model.parameters())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "settings",
    [
        {"params": 0.3, "scope": "global", "importance": "lamp", "method": "select"},
        {"macs": 0.3, "scope": "predicted", "method": "folding"},
        {"channels": 0.3, "repair": "analytic", "importance": "fpgm"},
        {"channels": 0.5, "exclude": ["*mlp*"], "importance": "random", "seed": 3},
        {"channels": 0.3, "include": ["*"], "method": "folding"},
    ],
)
def test_every_setting_streams(tmp_path, source, settings, monkeypatch):
    monkeypatch.setattr(scratch, "MOST", 5000)  # files of scratch within one group
    prune_checkpoint(source, tmp_path / "out", **settings)
    require_equal(tmp_path / "out", in_memory(source, **settings))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_other_architectures_stream(tmp_path, name):
    model = build(name)
    source = saved(model, tmp_path / "source")
    prune_checkpoint(source, tmp_path / "out", channels=0.4, method="select")
    require_equal(tmp_path / "out", in_memory(source, channels=0.4, method="select"))


def test_both_names_of_tied_weights_may_be_stored(tmp_path):
    source = saved(llama(tied=True), tmp_path / "source")
    prune_checkpoint(source, tmp_path / "one", channels=0.4, method="select")
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    rewrite(source, lambda t: t.update({k: t[v].clone() for k, v in tied.items()}))
    prune_checkpoint(source, tmp_path / "both", channels=0.4, method="select")
    rewrite(source, lambda t: t.pop("model.embed_tokens.weight"))
    prune_checkpoint(source, tmp_path / "other", channels=0.4, method="select")
    one = tensors(tmp_path / "one")
    for again in ("both", "other"):
        found = tensors(tmp_path / again)
        assert found.keys() == one.keys()
        assert all(torch.equal(found[name], one[name]) for name in one)


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [(), ("*#width",)])
def test_a_streamed_folder_loads(tmp_path, source, exclude):
    (source / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    settings = {"channels": 0.5, "method": "select", "exclude": exclude}
    made = prune_checkpoint(source, out, shard_size="20KB", **settings)
    expected = in_memory(source, **settings)
    tokens = torch.arange(8)[None]
    loaded = intrafuse.load(out, llama(seed=1))
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for size in (*sizes, "head_dim"):
        assert getattr(loaded.config, size) == getattr(expected.config, size), size
    assert made.pretrained == bool(exclude)
    if exclude:
        again = transformers.LlamaForCausalLM.from_pretrained(out).eval()
        assert torch.equal(again(tokens).logits, expected(tokens).logits)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors.index.json", "tokenizer_config.json", "recipe.yaml"} <= names
    assert not (out / SCRATCH).exists()
    sizes = [path.stat().st_size for path in out.glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 25_000
    assert made.report.wanted == {"channels": 0.5} and "Pruned in" in str(made.report)


def test_a_changed_shard_is_refused(tmp_path, source):
    out = tmp_path / "out"
    prune_checkpoint(source, out, channels=0.5, method="select", shard_size="40KB")
    shard = sorted(out.glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(IntrafuseError, match="corrupt"):
        intrafuse.load(out, llama())


# --- interrupted runs ---------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """List the files of a result; those with times by their names alone."""
    timed = ("intrafuse.json",)
    return {
        str(path.relative_to(folder)): b"" if path.name in timed else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("method", ["select", "moment"])
def test_a_run_that_is_killed_anywhere_goes_on(tmp_path, source, method):
    run = partial(prune_checkpoint, source, channels=0.5, method=method, shard_size="40KB")
    run(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    for at in itertools.count(0, 29):
        out = tmp_path / str(at)
        came = killed(partial(run, out), at)
        if (out / SCRATCH).exists() or not (out / "intrafuse.json").exists():
            run(out)
        else:  # it was finished, and what it has left is removed
            with pytest.raises(IntrafuseError, match="holds a network"):
                run(out)
        assert contents(out) == expected
        intrafuse.load(out, llama())
        if not came:
            break
    assert at > 100


class Stopped(Exception):
    """Stands for what stops a run."""


def test_a_run_that_goes_on_does_only_the_rest(tmp_path, source):
    told: list[tuple[str, int, int]] = []

    def stopping(at: tuple[str, int, int] | None, *step: object) -> None:
        told.append(step)
        if step == at:
            raise Stopped

    run = partial(
        prune_checkpoint, source, tmp_path / "out", channels=0.5, method="select",
        shard_size="20KB",
    )  # fmt: skip
    for at in (("scoring", 3, 5), ("merging", 2, 5), ("writing", 1, 4)):
        with pytest.raises(Stopped):
            run(progress=partial(stopping, at))
    made = run(progress=partial(stopping, None))
    scored, merged, written = (
        [done for step, done, _ in told if step == name]
        for name in ("scoring", "merging", "writing")
    )
    assert scored == [1, 2, 3, 4, 5]
    assert merged == [1, 2, 1, 2, 3, 4, 5, *(1, 2, 3, 4, 5)]  # those that are merged count at once
    assert written == [0, 1, 0, 1, 2, 3, 4]
    assert made.seconds > 0


def test_batch_norm_and_its_statistics_survive_a_kill(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    source = saved(model, tmp_path / "source", "5KB")
    run = partial(prune_checkpoint, source, channels=0.4, method="moment", shard_size="4KB")
    run(tmp_path / "undisturbed")
    require_equal(tmp_path / "undisturbed", in_memory(source, channels=0.4, method="moment"))
    expected = contents(tmp_path / "undisturbed")
    for at in (60, 95, 130, 180):
        assert killed(partial(run, tmp_path / str(at)), at)
        run(tmp_path / str(at))
        assert contents(tmp_path / str(at)) == expected


def test_two_runs_at_once_are_refused(tmp_path, source):
    def again(step: str, done: int, total: int) -> None:
        with pytest.raises(IntrafuseError, match=r"another run works in this folder.*wait"):
            run()
        tried.append(step)

    tried: list[str] = []
    run = partial(prune_checkpoint, source, tmp_path / "out", channels=0.5, method="select")
    run(progress=again)
    assert tried


# --- memory -------------------------------------------------------------------------------------


def test_few_tensors_are_in_memory_at_once(tmp_path, source, monkeypatch):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    load, most = StoredTensor.load, []

    def counted(self):
        tensor = load(self)
        alive.add(tensor)
        most.append(sum(one.numel() for one in alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "load", counted)
    gc.disable()  # reference counts alone free them
    try:
        prune_checkpoint(source, tmp_path / "out", channels=0.5, method="select")
    finally:
        gc.enable()
    mlp = 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert max(most) <= mlp < sum(p.numel() for p in llama().parameters()) / 3


# --- refusals -----------------------------------------------------------------------------------


def test_another_command_in_the_same_folder_is_refused(tmp_path, source):
    out = tmp_path / "out"
    assert killed(partial(prune_checkpoint, source, out, channels=0.5, method="select"), 60)
    with pytest.raises(IntrafuseError, match=r"interrupted run of another command.*repeat that"):
        prune_checkpoint(source, out, channels=0.4, method="select")
    (out / SCRATCH / "journal.json").write_text("{")
    with pytest.raises(IntrafuseError, match=r"journal .* cannot be read.*delete"):
        prune_checkpoint(source, out, channels=0.5, method="select")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "moment", "repair": "batchnorm"}, "repair 'batchnorm'"),
        ({"method": "select", "repair": "synthetic"}, "repair 'synthetic'"),
        ({"importance": "taylor"}, "importance 'taylor'"),
        ({"importance": "synflow"}, "importance 'synflow'"),
        ({"method": Moment(source="synthetic")}, "source 'synthetic'"),
        ({"channels": None, "latency": 0.3}, "a latency budget"),
        ({"shard_size": "many"}, "size of a shard.*got 'many'"),
        ({"shard_size": 0}, "size of a shard"),
    ],
)
def test_settings_that_run_the_model_are_refused(tmp_path, source, settings, match):
    with pytest.raises(IntrafuseError, match=match) as told:
        prune_checkpoint(source, tmp_path / "out", **{"channels": 0.5, **settings})
    assert told.value.usage and not (tmp_path / "out").exists()


def rewrite(folder: Path, change) -> None:
    """Replace the shards of a checkpoint by one file with changed tensors."""
    found = tensors(folder)
    change(found)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"params": 0.99}, "."), ({"channels": 0.5, "include": ["no_such"]}, "no_such")],
)
def test_what_is_refused_late_leaves_nothing(tmp_path, source, settings, match):
    with pytest.raises(IntrafuseError, match=match):
        prune_checkpoint(source, tmp_path / "out", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


MLP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(MLP), f"missing: {MLP}"),
        (lambda t: t.update(other=torch.ones(1)), "unexpected: other"),
        (lambda t: t.update({MLP: torch.ones(3, 2)}), rf"misshapen: {MLP}.*\[3, 2\]"),
        (lambda t: t.update({MLP: t[MLP].to(torch.float8_e4m3fn)}), "16 bits or more.*F8_E4M3"),
        (lambda t: t.update({MLP: t[MLP].to(torch.int8)}), "16 bits or more.*I8"),
        (lambda t: t[MLP].fill_(torch.nan), f"must be finite.*{MLP}"),
        (lambda t: t["lm_head.weight"].fill_(torch.inf), r"must be finite.*lm_head"),
    ],
)
def test_weights_that_cannot_be_pruned_are_refused(tmp_path, source, change, match):
    rewrite(source, change)
    with pytest.raises(IntrafuseError, match=match):
        prune_checkpoint(source, tmp_path / "out", channels=0.5, method="select")


def test_models_that_transformers_renames_are_refused(tmp_path):
    source = saved(build("vit"), tmp_path / "source")
    with pytest.raises(IntrafuseError, match=r"missing: .*unexpected: .*renames.*intrafuse.prune"):
        prune_checkpoint(source, tmp_path / "out", channels=0.5)


def break_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: next(f.glob("model-*")).unlink(), "missing, truncated"),
        (lambda f: next(f.glob("model-*")).write_bytes(b"no"), "truncated, corrupt"),
        (lambda f: break_index(f, lambda m: m.update({MLP: "../x"})), "index.*same folder"),
        (lambda f: break_index(f, lambda m: m.pop(MLP)), f"index and the shards disagree.*{MLP}"),
        (lambda f: (f / "model.safetensors.index.json").write_text("["), "index .* cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda f: [p.unlink() for p in f.glob("model*")], "a checkpoint needs model.safetensors"),
        (
            lambda f: [p.rename(p.with_suffix(".bin")) for p in f.glob("model*")],
            "nothing is unpickled",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path, source, damage, match):
    damage(source)
    with pytest.raises(IntrafuseError, match=match):
        prune_checkpoint(source, tmp_path / "out", channels=0.5)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_refused(tmp_path, source):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for out, match in (
        (tmp_path / "other", "holds other files.*mine.txt.*choose a new folder"),
        (source, "not pruned in place"),
        (source / "config.json" / "x", "cannot be written|not pruned in place"),
    ):
        with pytest.raises(IntrafuseError, match=match):
            prune_checkpoint(source, out, channels=0.5)
