"""Hugging Face models: `hf:FOLDER`, with a configuration and safetensors, or `hf:NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.data import import_extra
from intrafuse.errors import IntrafuseError

__all__ = ["from_hub"]

TOKENS = 16  # of the sequence that a language model is traced with


def from_hub(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Load a transformers model, and make inputs for it.

    Args:
        name: a folder that `save_pretrained` wrote, or a model's name on the hub. A folder
            without weights gives random ones. No code of the folder is run, nothing unpickled.
        arguments: changes fields of the configuration.

    Raises:
        IntrafuseError: transformers is not installed, or the model cannot be loaded.
    """
    transformers = import_extra("transformers", "hf")
    local = Path(name).is_dir()
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, local_files_only=local, trust_remote_code=False, **arguments
        )
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        if local and not any(Path(name).glob("*.safetensors")):
            model = kind(config) if kind is not transformers.AutoModel else kind.from_config(config)
        else:
            model = kind.from_pretrained(
                name, config=config, local_files_only=local, use_safetensors=True
            )
    except Exception as error:  # what a configuration or a file may do wrong is without end
        raise IntrafuseError(
            f"the model cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})",
            value=f"hf:{name}",
            remedy="give a folder with config.json and *.safetensors, as save_pretrained writes",
        ) from error
    return model, _inputs(model)


def _inputs(model: Any) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Make inputs of the kind that a model takes, from its configuration."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, _field(config, "vocab_size", 2), (1, TOKENS), generator=generator)
    first = model.main_input_name
    if first == "pixel_values":
        size = _field(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, _field(config, "num_channels", 3), height, width)
        given = torch.randn(shape, generator=generator)
    elif first == "input_features":
        length = 2 * _field(config, "max_source_positions", 1500)
        given = torch.randn(1, _field(config, "num_mel_bins", 80), length, generator=generator)
    elif first == "input_ids":
        given = tokens
    else:
        raise IntrafuseError(
            f"inputs named {first} cannot be made up",
            value=type(model).__name__,
            remedy="write a factory with the attribute example_inputs, and name it module:factory",
        )
    if getattr(config, "is_encoder_decoder", False):
        return {first: given, "decoder_input_ids": tokens[:, : TOKENS // 2]}
    return (given,)


def _field(config: Any, name: str, default: int) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
