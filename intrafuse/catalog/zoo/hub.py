"""Hugging Face models: `hf:FOLDER`, with a configuration and safetensors, or `hf:NAME`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.support.calls import alone
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra
from intrafuse.support.reading import require_file

__all__ = ["empty_from_folder", "from_hub", "require_none_pickled", "without_parameters"]

TOKENS = 16  # length of the sequence for tracing a language model


def from_hub(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Load a transformers model and make example inputs for it.

    Args:
        name: a folder that `save_pretrained` wrote, or a model's name on the hub. A folder
            without weights yields random weights. No code in the folder is run, and no file is
            unpickled.
        arguments: fields of the configuration to change.

    Raises:
        IntrafuseError: transformers is not installed, or the model cannot be loaded.
    """
    transformers = import_extra("transformers", "hf")
    local = Path(name).is_dir()
    try:
        if local:
            for path in Path(name).iterdir():
                if not path.is_dir():
                    require_file(path)
        config = transformers.AutoConfig.from_pretrained(
            name, local_files_only=local, trust_remote_code=False, **arguments
        )
        kind = _class(transformers, config)
        if local and not any(Path(name).glob("*.safetensors")):
            require_none_pickled(Path(name))
            model = kind(config)
        else:
            model = kind.from_pretrained(
                name, config=config, local_files_only=local, use_safetensors=True
            )
        return model, _inputs(model)
    except IntrafuseError:
        raise
    except Exception as error:  # configurations and files can fail in any way
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> IntrafuseError:
    reason = str(error).partition("\n")[0]
    return IntrafuseError(
        f"the model cannot be loaded ({type(error).__name__}: {reason})",
        value=f"hf:{name}",
        remedy="name a folder with config.json and *.safetensors, as save_pretrained writes",
    )


def _class(transformers: Any, config: Any) -> Any:
    """Return the class that a configuration names, if it is a model of the same `model_type`.

    No other object of transformers is called, and no code from the hub is run.
    """
    for way in _implementations(config):
        if "/" in str(way):
            raise IntrafuseError("a configuration must not name kernels on the hub", value=way)
    named = (config.architectures or [None])[0]
    if named is None:
        found = transformers.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple | list) else found
    kind = getattr(transformers, named, None) if isinstance(named, str) else None
    model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not model or getattr(kind, "config_class", None) is not type(config):
        raise IntrafuseError(
            f"architectures must name a model of transformers for {config.model_type!r}",
            value=named,
            remedy="correct config.json",
        )
    return kind


def _implementations(config: Any) -> Iterator[object]:
    """List the attention and expert implementations that a configuration and its parts name."""
    for name in ("_attn_implementation", "_experts_implementation"):
        yield getattr(config, name, None)
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        yield from () if inner is None else _implementations(inner)


def empty_from_folder(folder: Path) -> tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]:
    """Build a transformers model without its parameters, and make example inputs for it.

    Args:
        folder: holds `config.json`. No code in the folder is run, and no weights are read.

    Returns:
        The model in evaluation mode, with parameters on the meta device and buffers on the CPU;
        and the inputs, on the CPU.

    Raises:
        IntrafuseError: transformers is not installed, or the model cannot be built.
    """
    transformers = import_extra("transformers", "hf")
    try:
        require_file(folder / "config.json")
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        kind = _class(transformers, config)
        with without_parameters(getattr(config, "dtype", None)):
            model = kind(config).eval()
        return model, _inputs(model)
    except IntrafuseError:
        raise
    except Exception as error:  # configurations can fail in any way
        raise _cannot_load(str(folder), error) from error


@contextmanager
def without_parameters(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Put the parameters of modules that this thread builds on the meta device, buffers not.

    Args:
        dtype: of parameters and buffers whose dtype the code does not say.

    >>> with without_parameters():
    ...     norm = nn.BatchNorm1d(3)
    >>> norm.weight.device.type, norm.running_mean.device.type
    ('meta', 'cpu')
    """
    register, own = nn.Module.register_parameter, threading.get_ident()

    def emptied(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() == own and param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    before = torch.get_default_dtype()
    with alone():
        nn.Module.register_parameter = emptied  # type: ignore[method-assign]
        try:
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                torch.set_default_dtype(dtype)
            yield
        finally:
            torch.set_default_dtype(before)
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def require_none_pickled(folder: Path) -> None:
    """Refuse a folder with weights in other formats, which would be replaced by random ones.

    Raises:
        IntrafuseError: the folder holds such weights.
    """
    known = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
    ignored = sorted(path.name for path in folder.iterdir() if path.suffix in known)
    if ignored:
        raise IntrafuseError(
            "weights are read only from safetensors, and nothing is unpickled",
            value=ignored[0],
            layer=str(folder),
            remedy="save the model again with save_pretrained",
        )


def _inputs(model: Any) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Make example inputs for a model from its configuration."""
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
            f"inputs named {first} cannot be made automatically",
            value=type(model).__name__,
            remedy="write a factory with the attribute example_inputs, and name it module:factory",
        )
    if getattr(config, "is_encoder_decoder", False):
        return {first: given, "decoder_input_ids": tokens[:, : TOKENS // 2]}
    return (given,)


def _field(config: Any, name: str, default: int) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
