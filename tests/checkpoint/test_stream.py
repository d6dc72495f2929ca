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
from intrafuse.checkpoint.scratch import SCRATCH
from intrafuse.checkpoint.stored import StoredTensor

LLAMA = {
    **SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 32,
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
    return intrafuse.prune(net.model, net.example_inputs, check=False, **settings).model


def require_equal(out: Path, model: nn.Module) -> None:
    """Compare a folder with a module, bit for bit; tied parameters are stored once."""
    found = tensors(out)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- equality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["select", "intra-fusion", "folding", "moment"])
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
