"""The state of a training on disk: a safetensors file, atomically replaced after each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafuse.support.files import replacing
from intrafuse.support.reading import require_file

__all__ = ["read_state", "write_state"]


def write_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
    epoch: int,
) -> None:
    """Write weights, momentum and the number of completed epochs.

    Args:
        path: path of the file.
        model: the network.
        optimizer: an SGD optimizer; its state is the momentum of each parameter.
        identity: data that identify this training.
        epoch: number of completed epochs.

    Raises:
        IntrafuseError: the file cannot be written. The previous file stays.
    """
    tensors = {f"model.{name}": t.contiguous() for name, t in _state(model).items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum.contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**identity, "epoch": str(epoch)})


def read_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> int:
    """Load weights and momentum if the file is intact and belongs to the same training.

    Returns:
        The number of completed epochs: 0 if there is nothing to resume. A broken file is ignored;
        the training then starts from the beginning and ends with the same network.
    """
    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return 0
    state, epoch = _state(model), told.pop("epoch", "")
    names = {f"model.{name}": tensor for name, tensor in state.items()}
    fits = all(n in tensors and tensors[n].shape == t.shape for n, t in names.items()) and all(
        tensors.get(f"momentum.{n}", p).shape == p.shape for n, p in model.named_parameters()
    )
    if told != dict(identity) or not epoch.isdecimal() or not fits:
        return 0
    with torch.no_grad():
        for name, tensor in names.items():
            tensor.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        momentum = tensors.get(f"momentum.{name}")
        if momentum is not None:
            like = torch.empty_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = like.copy_(momentum).detach()
    return int(epoch)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor once; a shared tensor has its first name."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), name)
    first = set(seen.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name in first}
