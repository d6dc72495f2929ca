"""Folders of transformers: nothing in them decides what code runs, and nothing is unpickled."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from intrafuse import IntrafuseError
from intrafuse.catalog.zoo import resolve_model
from intrafuse.catalog.zoo.hub import empty_from_folder, without_parameters

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from language_models import transformers

TINY = {
    **{"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20},
    **{"n_positions": 32, "bos_token_id": 1, "eos_token_id": 1},
}


def folder_of(path: Path, **fields: object) -> str:
    """Write a configuration, without weights unless `architectures` is left out."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**TINY, **fields}))
    return f"hf:{path}"


@pytest.mark.parametrize(
    ("architectures", "kind"),
    [
        (["GPT2LMHeadModel"], "GPT2LMHeadModel"),
        (["GPT2ForSequenceClassification"], "GPT2ForSequenceClassification"),
        (None, "GPT2Model"),
        ([], "GPT2Model"),
    ],
)
def test_models_of_the_configurations_own_type_are_built(tmp_path, architectures, kind):
    name = folder_of(tmp_path / "m", architectures=architectures)
    assert type(resolve_model(name).model).__name__ == kind


@pytest.mark.parametrize(
    "named",
    [
        *("pipeline", "AutoConfig", "AutoModel", "Trainer", "GPT2Config", "PreTrainedModel"),
        *(
            "BertModel",
            "LlamaForCausalLM",
            "torch",
            "os",
            "__file__",
            "",
            "no_such",
            "GPT2Tokenizer",
        ),
    ],
)
def test_whatever_else_transformers_holds_is_not_called(tmp_path, named):
    name = folder_of(tmp_path / "m", architectures=[named])
    with pytest.raises(IntrafuseError, match=r"architectures must name a model.*'gpt2'"):
        resolve_model(name)


@pytest.mark.parametrize("architectures", [[3], [["GPT2Model"]], {"a": 1}, 7, "GPT2Model"])
def test_architectures_that_are_no_names_are_refused(tmp_path, architectures):
    with pytest.raises(IntrafuseError):
        resolve_model(folder_of(tmp_path / "m", architectures=architectures))


EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import GPT2Config, GPT2Model
class EvilConfig(GPT2Config):
    model_type = "evil"
class EvilModel(GPT2Model):
    config_class = EvilConfig
"""


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_in_the_folder_does_not_run(tmp_path, model_type):
    mark = tmp_path / "mark"
    name = folder_of(
        tmp_path / "m",
        model_type=model_type,
        architectures=["EvilModel"],
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    )
    (tmp_path / "m" / "evil.py").write_text(EVIL.format(mark=str(mark)))
    with pytest.raises(IntrafuseError):
        resolve_model(name)
    assert not mark.exists()


def test_code_beside_a_known_model_does_not_run(tmp_path):
    mark = tmp_path / "mark"
    name = folder_of(tmp_path / "m", auto_map={"AutoModel": "evil.EvilModel"})
    (tmp_path / "m" / "evil.py").write_text(EVIL.format(mark=str(mark)))
    assert type(resolve_model(name).model) is transformers.GPT2Model and not mark.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_not_fetched(tmp_path, field):
    name = folder_of(tmp_path / "m", **{field: "somebody/kernel"})
    with pytest.raises(IntrafuseError, match="must not name kernels on the hub"):
        resolve_model(name)


class Mark:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_pickled_weights_are_refused_and_not_passed_over(tmp_path, file):
    mark = tmp_path / "mark"
    name = folder_of(tmp_path / "m", architectures=["GPT2Model"])
    (tmp_path / "m" / file).write_bytes(pickle.dumps(Mark(mark)))
    with pytest.raises(IntrafuseError, match="nothing is unpickled"):
        resolve_model(name)
    assert not mark.exists()


def test_pickled_weights_beside_safetensors_are_not_read(tmp_path):
    mark = tmp_path / "mark"
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**TINY))
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Mark(mark)))
    again = resolve_model(f"hf:{tmp_path / 'm'}").model
    assert torch.equal(again.wte.weight, model.wte.weight) and not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pipe_in_the_folder_is_refused(tmp_path, file):
    name = folder_of(tmp_path / "m")
    (tmp_path / "m" / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / file)
    with pytest.raises(IntrafuseError, match="no ordinary file"):
        resolve_model(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": "x"},
        {"vocab_size": -3},
        {"n_layer": None},
        {"model_type": []},
        {"dtype": "load"},
    ],
)
def test_configurations_of_wrong_kinds_are_refused(tmp_path, fields):
    with pytest.raises(IntrafuseError):
        resolve_model(folder_of(tmp_path / "m", **fields))


# --- models without parameters ------------------------------------------------------------------


def test_a_model_without_parameters_has_its_buffers(tmp_path):
    model, inputs = empty_from_folder(Path(folder_of(tmp_path / "m").removeprefix("hf:")))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training and inputs[0].shape == (1, 16)
    assert model.get_input_embeddings().weight.shape == (20, 8)


def test_only_modules_of_the_same_thread_are_built_without_parameters():
    before = nn.Module.register_parameter
    with without_parameters(torch.bfloat16), ThreadPoolExecutor(1) as pool:
        mine, other = nn.Linear(2, 2), pool.submit(nn.Linear, 2, 2).result()
        assert mine.weight.is_meta and mine.weight.dtype == torch.bfloat16
        assert not other.weight.is_meta
    assert nn.Module.register_parameter is before and torch.get_default_dtype() == torch.float32
