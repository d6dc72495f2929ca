"""Small random Hugging Face models, built from configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from architectures import import_torchvision
from torch import Tensor, nn

import_torchvision()

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

COMMON = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**COMMON, "intermediate_size": 48}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
WHISPER = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip

# model, its configuration, and the class of the model in transformers
MODELS: dict[str, tuple[str, str, dict]] = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "vit": ("ViTModel", "ViTConfig", IMAGE),
    "deit": ("DeiTModel", "DeiTConfig", IMAGE),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_inner": 48}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 8}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**COMMON, "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
            "num_heads": 4, "decoder_start_token_id": 0,
        },
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a small model with random weights, large enough that no error can hide."""
    factory, config, settings = MODELS[name]
    model = getattr(transformers, factory)(getattr(transformers, config)(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """Make a batch that a model takes."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 8), generator=generator)
    if name in ("vit", "deit", "swin"):
        size = 32 if name == "swin" else 16
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if name == "whisper":
        sound = torch.randn(2, 8, 32, generator=generator)
        return {"input_features": sound, "decoder_input_ids": tokens[:, :5]}
    if name == "t5":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    return {"input_ids": tokens}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Run a model without its cache, and list the tensors that it gives."""
    quiet: Callable = model.__call__
    keywords = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with torch.no_grad():
        given = quiet(**batch, **keywords)
    return [tensor for tensor in given.values() if isinstance(tensor, Tensor)]
