"""Configurations of Hugging Face transformers for the zoo sweep: small, with random weights.

Each entry names a model class, its configuration class with small sizes, and inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["CONFIGURATIONS", "from_transformers"]

ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 120, "max_position_embeddings": 64}
BERT = {**ENCODER, **WORDS, "intermediate_size": 128}
LLAMA = {**BERT, "num_key_value_heads": 2}
VIT = {**ENCODER, "intermediate_size": 128, "image_size": 32, "patch_size": 8}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 64}
T5 = {
    **{"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 120},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}
BART = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}
WHISPER = {
    **{**BART, "vocab_size": 120, "num_mel_bins": 16, "max_source_positions": 16},
    **{"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1},
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}

# name: (model class, configuration class, its arguments, kind of input)
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, "words"),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", BERT, "words"),
    "roberta": ("RobertaModel", "RobertaConfig", BERT, "words"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **WORDS},
        "words",
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**BERT, "embedding_size": 32}, "words"),
    "electra": ("ElectraModel", "ElectraConfig", {**BERT, "embedding_size": 32}, "words"),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT, "image"),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {**ENCODER, "image_size": 32, "patch_size": 8},
        "image",
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "window_size": 4}, "image"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "words"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT, "words"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "words"),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, "words"),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
        "words",
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA, "words"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16}, "words"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 16}, "words"),
    "phi": ("PhiForCausalLM", "PhiConfig", BERT, "words"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**LLAMA, "initializer_range": 0.125}, "words"),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", LLAMA, "words"),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**ENCODER, **WORDS}, "words"),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 16},
        "words",
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "words",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**ENCODER, **WORDS, "ffn_dim": 128, "word_embed_proj_dim": 64},
        "words",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "pair"),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "pair",
    ),
    "bart": ("BartModel", "BartConfig", {**BART, **WORDS}, "pair"),
    "whisper": ("WhisperModel", "WhisperConfig", WHISPER, "speech"),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", VIT, "image"),
}


def from_transformers(name: str) -> tuple[nn.Module, list[Any]]:
    """Build a network of the table, with the inputs that it takes."""
    import transformers

    model, configuration, settings, kind = CONFIGURATIONS[name]
    config = getattr(transformers, configuration)(**settings)
    return getattr(transformers, model)(config), [_inputs(kind)]


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def words() -> torch.Tensor:
        return torch.randint(3, 120, (2, 8), generator=generator)

    if kind == "words":
        return {"input_ids": words()}
    if kind == "pair":
        return {"input_ids": words(), "decoder_input_ids": words()}
    if kind == "speech":
        speech = torch.randn(2, 16, 32, generator=generator)
        return {"input_features": speech, "decoder_input_ids": words()}
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
