"""Methods that merge, on small random language models.

None crashes, all outputs are finite, and readers that were re-solved by moments come no further
from the original than conventional pruning does, but for a tenth.
"""

from __future__ import annotations

import pytest
import torch
from language_models import SIZES, transformers
from networks import covering
from torch import Tensor, nn

import intrafuse

DECODER = {**SIZES, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
GPT_NEO = {
    "vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
    "intermediate_size": 48, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "attention_types": [[["global", "local"], 1]], "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {**DECODER, "num_key_value_heads": 2}),
    "gpt_neo": ("GPTNeo", GPT_NEO),
    "gpt_neox": ("GPTNeoX", DECODER),
    "stablelm": ("StableLm", {**DECODER, "num_key_value_heads": 4}),
    "phi": ("Phi", DECODER),
    "olmo2": ("Olmo2", DECODER),
}  # fmt: skip


def language_model(name: str, **more: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a small random model in evaluation mode, and tokens for it."""
    kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**settings, **more}, use_cache=False)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        return model.eval(), {"input_ids": torch.randint(3, 100, (64, 12))}


def lost(model: nn.Module, batch: dict[str, Tensor], method: str, **settings: object) -> float:
    """Return the relative error of a pruned language model's outputs."""
    few = {name: tensor[:2] for name, tensor in batch.items()}
    pruned = intrafuse.prune(model, few, channels=0.3, method=method, check=False, **settings)  # type: ignore
    with torch.no_grad():
        new, old = (net(**batch).logits for net in (pruned.model, model))
    assert new.isfinite().all()
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize(("name", "method"), covering(MODELS, ["intra-fusion", "auto"]))
def test_merging_methods_run_on_language_models(name, method):
    model, batch = language_model(name)
    errors = {m: lost(model, batch, m) for m in ("select", method, "moment")}
    assert errors["moment"] <= 1.1 * errors["select"]


def test_a_norm_behind_a_block_keeps_its_scale():
    """What a block reads in its first layer is small, and a norm behind it makes it large."""
    model, batch = language_model("olmo2", initializer_range=0.02)
    first = ["model.layers.0.mlp*"]
    select, moment = (lost(model, batch, m, include=first) for m in ("select", "moment"))
    assert moment <= 1.1 * select
