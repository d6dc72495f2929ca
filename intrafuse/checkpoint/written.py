"""The folder that streaming writes: shards, index, configuration, copies, and the manifest last."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from intrafuse.catalog.zoo import file_sha256
from intrafuse.catalog.zoo.hub import empty_from_folder
from intrafuse.catalog.zoo.weights import require_keys
from intrafuse.checkpoint.describe import (
    Planned,
    history,
    identities,
    pruned_axes,
    require_text,
    versions,
)
from intrafuse.checkpoint.loading import BUFFERS, WEIGHTS
from intrafuse.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    RECIPE,
    SCHEMA,
    Manifest,
    Stored,
    as_json,
)
from intrafuse.checkpoint.scratch import Kept, Scratch
from intrafuse.checkpoint.source import Source, emptied, unsaved
from intrafuse.checkpoint.stored import INDEX, StoredTensor, bytes_of, write_tensors
from intrafuse.checkpoint.tensors import dtype_name, memory_order
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing
from intrafuse.support.modules import place
from intrafuse.support.reading import read_json
from intrafuse.surgery.handles import Held
from intrafuse.surgery.hf_config import follow_sizes
from intrafuse.surgery.install import size_changes
from intrafuse.surgery.weights import Weights

__all__ = ["Output", "parse_size"]

COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "generation_config.json", "chat_template*", "*processor_config.json"),
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Return a number of bytes.

    Raises:
        IntrafuseError: it is no size, or less than one byte.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size).upper())
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1 or isinstance(size, bool):
        raise IntrafuseError(
            "the size of a shard must be a number of bytes, such as 500MB or 5GB",
            value=size,
            usage=True,
        )
    return number


@dataclass(frozen=True, eq=False)
class Output:
    """The folder that a streamed pruning writes.

    Attributes:
        folder: where.
        source: the checkpoint that was pruned.
        weights: its pruned tensors.
        scratch: the scratch files, whose journal notes the finished files.
        most: most bytes of a shard, unless one tensor has more.
    """

    folder: Path
    source: Source
    weights: Weights
    scratch: Scratch
    most: int

    def write_shards(self, progress: Callable[[int, int], None]) -> None:
        """Write the shards one by one, and the index; finished shards stay."""
        files = self._files()
        progress(0, len(files))
        for done, (name, tensors) in enumerate(files.items(), 1):
            if name not in self.scratch.journal.shards:
                digest = write_tensors(self.folder / name, tensors)
                self.scratch.note(shards={**self.scratch.journal.shards, name: digest})
            progress(done, len(files))
        places = {n: file for file, held in files.items() if file != BUFFERS for n in held}
        if WEIGHTS not in files:
            size = sum(bytes_of(self.weights.held[name]) for name in places)
            index = {"metadata": {"total_size": size}, "weight_map": places}
            self._write(INDEX, json.dumps(index, indent=2))

    def _files(self) -> dict[str, dict[str, Held]]:
        """Distribute the tensors over files, in the order of the model."""
        apart = unsaved(self.source.model)
        own = {name: t for name, t in self.weights.held.items() if name not in apart}
        parts = [*_parts(own, self.most)]
        count = len(parts)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        files = dict(zip([WEIGHTS] if count == 1 else names, parts, strict=True))
        computed = {name: t for name, t in self.weights.held.items() if name in apart}
        return {**files, **({BUFFERS: computed} if computed else {})}

    def write_configuration(self) -> bool:
        """Write `config.json` with the new sizes, and copy what belongs to a tokenizer.

        Returns:
            Whether `from_pretrained` builds the pruned network from it.
        """
        model, weights = self.source.model, self.weights
        attributes = weights.graph.attribute_values(weights.sizes)
        sizes = {name: emptied(held) for name, held in weights.held.items()}
        apart = unsaved(model)
        place(model, sizes, attributes, (), weights.graph.aliases)
        changed = follow_sizes(model, size_changes(weights.graph, weights.sizes))
        config = {**read_json(self.source.folder / CONFIG), **changed}
        self._write(CONFIG, json.dumps(config, indent=2))
        for path in sorted(self.source.folder.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
                with replacing(self.folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        return _builds(self.folder, sizes, apart)

    def write_manifest(
        self, planned: Planned, seconds: float, recipe: Mapping[str, Any] | None
    ) -> None:
        """Write `intrafuse.json`, which names every file with its digest."""
        graph = self.weights.graph
        if recipe is not None:
            self._write(RECIPE, json.dumps(as_json(dict(recipe), "recipe"), indent=2))
        shards = self.scratch.journal.shards
        others = [p for p in self.folder.iterdir() if p.is_file() and p.name not in shards]
        digests = {p.name: file_sha256(p) for p in others if p.name != MANIFEST}
        manifest = Manifest(
            schema_version=SCHEMA,
            architecture=f"hf:{self.source.folder}",
            tensors={
                name: Stored(
                    shape=tuple(held.shape),
                    dtype=dtype_name(held),
                    pruned_axes=pruned_axes(graph, name),
                    order=_order(held),
                )
                for name, held in self.weights.held.items()
            },
            aliases=dict(graph.aliases),
            removed_layers=identities(self.source.model),
            files=dict(sorted({**shards, **digests}.items())),
            versions=versions(),
            **history(planned, seconds),
        )
        require_text(manifest)
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(manifest.text(), "utf-8")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text + "\n", "utf-8")


def _parts(tensors: Mapping[str, Held], most: int) -> Iterator[dict[str, Held]]:
    """Split tensors into parts of at most `most` bytes; a larger tensor is a part of its own."""
    part: dict[str, Held] = {}
    size = 0
    for name, held in tensors.items():
        if part and size + bytes_of(held) > most:
            yield part
            part, size = {}, 0
        part[name] = held
        size += bytes_of(held)
    yield part


def _order(held: Held) -> tuple[int, ...] | None:
    if isinstance(held, Tensor):
        return memory_order(held)
    return held.order if isinstance(held, Kept | StoredTensor) else None


def _builds(folder: Path, sizes: Mapping[str, Tensor], apart: set[str]) -> bool:
    """Tell whether the configuration in a folder builds a model of these sizes."""
    try:
        model, _ = empty_from_folder(folder)
        saved = {name: tensor for name, tensor in sizes.items() if name not in apart}
        require_keys(model, saved, folder)
    except IntrafuseError:
        return False
    computed = dict(model.named_buffers())
    return all(computed[name].shape == sizes[name].shape for name in apart if name in sizes)
