"""The checkpoint that is streamed: handles of its tensors, and its model without them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafuse.catalog.zoo.hub import empty_from_folder
from intrafuse.catalog.zoo.weights import require_keys
from intrafuse.checkpoint.manifest import CONFIG
from intrafuse.checkpoint.stored import StoredTensor, stored_tensors
from intrafuse.graph import trace
from intrafuse.pruning.prepare import Prepared, prepare
from intrafuse.pruning.settings import Settings
from intrafuse.support.batches import map_tensors
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.reading import read_text
from intrafuse.surgery.handles import Held
from intrafuse.surgery.weights import Weights

__all__ = ["Source", "emptied", "unsaved"]

RENAMED = (
    "check config.json; where transformers renames or joins the tensors of a model as it loads "
    "them, streaming cannot read them: use intrafuse.prune"
)


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint in the format of transformers.

    Attributes:
        folder: where it lies.
        model: the model, entirely on the meta device.
        inputs: example inputs, on the meta device.
        held: handles of its parameters and buffers, and the buffers that no checkpoint holds, by
            their first name.
        digest: changes if the configuration or a file of weights changes.
    """

    folder: Path
    model: nn.Module
    inputs: Any
    held: Mapping[str, Held]
    digest: str

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Read the configuration and the names, shapes and types of the tensors.

        Raises:
            IntrafuseError: the checkpoint or its configuration cannot be read, or they disagree.
        """
        if not folder.is_dir():
            raise IntrafuseError(
                "a checkpoint is a folder", value=str(folder), remedy="name the folder itself"
            )
        given = stored_tensors(folder)
        digest = _digest(folder, {tensor.path for tensor in given.values()})
        model, inputs = empty_from_folder(folder)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        known = model.state_dict().keys()
        given = {
            name: tensor
            for name, tensor in given.items()
            if name in known or not any(re.search(pattern, name) for pattern in ignored)
        }
        shapes = {name: emptied(tensor) for name, tensor in given.items()}
        require_keys(model, shapes, folder, RENAMED)
        held = _by_first_name(model, given)
        _to_meta(model)
        inputs = map_tensors(lambda tensor: tensor.to("meta"), inputs)
        return cls(folder, model, inputs, held, digest)

    def prepared(
        self,
        asked: Settings,
        keep: Callable[[str, Tensor], Held] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prepared:
        """Trace the model, and make its tensors ready to be scored and merged.

        Args:
            asked: the settings.
            keep: as for `Weights`.
            progress: called with (groups merged, all groups).
        """
        graph = trace(self.model, self.inputs, include=asked.include or ())
        weights = Weights.of(graph, self.model, self.held, keep)
        return prepare(asked, weights, self.model, progress=progress)


def emptied(held: Held) -> Tensor:
    """Return a tensor on the meta device with the shape and the dtype of another."""
    return torch.empty(tuple(held.shape), dtype=held.dtype, device="meta")


def unsaved(model: nn.Module) -> set[str]:
    """Name the buffers that no checkpoint holds, because they are computed when built."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _digest(folder: Path, files: set[Path]) -> str:
    told = [read_text(folder / CONFIG)] if (folder / CONFIG).exists() else []
    for path in sorted(files):
        state = path.stat()
        told.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _by_first_name(model: nn.Module, given: Mapping[str, StoredTensor]) -> dict[str, Held]:
    """Name tensors as the graph does: tied ones by the first name in the model."""
    first: dict[int, str] = {}
    parameters = [*model.named_parameters(remove_duplicate=False)]
    named = [*parameters, *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    held: dict[str, Held] = {}
    for name, tensor in named:
        if name in given:
            held.setdefault(first[id(tensor)], given[name])
    for _, tensor in named[len(parameters) :]:  # buffers that the files lack
        held.setdefault(first[id(tensor)], tensor)
    return held


def _to_meta(model: nn.Module) -> None:
    """Move the buffers of a model to the meta device; shared ones stay shared."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones live until all are moved
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.setdefault(id(buffer), (buffer, buffer.to("meta")))
                module._buffers[name] = moved[id(buffer)][1]
