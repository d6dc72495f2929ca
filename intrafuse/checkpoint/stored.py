"""Tensors in safetensors files: read one by one, and written one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from intrafuse.catalog.zoo.hub import require_none_pickled
from intrafuse.checkpoint.loading import WEIGHTS
from intrafuse.checkpoint.manifest import Stored
from intrafuse.checkpoint.tensors import dtype_name, pack, unpack
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing
from intrafuse.support.reading import read_json, require_file
from intrafuse.surgery.handles import Held

__all__ = [
    "INDEX",
    "StoredTensor",
    "bytes_of",
    "stored_tensors",
    "tensors_of",
    "write_tensors",
]

INDEX = "model.safetensors.index.json"
ALIGNED = 8  # the header of a safetensors file is padded to a multiple of this many bytes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8", torch.int8: "I8"}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A handle of one tensor in a safetensors file.

    Attributes:
        path: the file.
        name: name of the tensor in it.
        shape: the sizes of its axes.
        dtype: the type of its elements.
        order: its axes from the largest to the smallest stride; None if they are in order.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    def numel(self) -> int:
        """Return the number of its elements."""
        return prod(self.shape)

    def load(self) -> Tensor:
        """Read the tensor into memory of its own.

        The file is opened anew for each read, so that no pages of it stay mapped.

        Raises:
            IntrafuseError: the file cannot be read any more.
        """
        stored = Stored(shape=self.shape, dtype=dtype_name(self), order=self.order)
        try:
            require_file(self.path)
            with safe_open(self.path, "pt") as file:
                return unpack(file.get_tensor(self.name), stored)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.path, error) from error


def bytes_of(held: Held) -> int:
    """Return the size of a tensor in a file."""
    return held.numel() * held.dtype.itemsize


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint: one file, or an index with its shards.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and what it names.

    Raises:
        IntrafuseError: there are no weights, they are pickled or cannot be read, the index and the
            shards disagree, or a tensor has a dtype that cannot be pruned (8 bits, or packed).
    """
    if (folder / INDEX).exists():
        return _indexed(folder)
    if not (folder / WEIGHTS).exists():
        require_none_pickled(folder)
        raise IntrafuseError(
            f"a checkpoint needs {WEIGHTS}, or {INDEX} with its shards",
            value=str(folder),
            remedy="name a folder that save_pretrained wrote",
        )
    return tensors_of(folder / WEIGHTS)


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    try:
        places = read_json(folder / INDEX)["weight_map"]
        shards = sorted(set(places.values()))
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise ValueError("a shard must lie in the same folder")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntrafuseError(
            f"the index of the shards cannot be read ({type(error).__name__}: {error})",
            value=str(folder / INDEX),
            remedy="save the model again with save_pretrained",
        ) from error
    found = {shard: tensors_of(folder / shard) for shard in shards}
    given = {(name, shard) for shard, tensors in found.items() for name in tensors}
    odd = sorted(given ^ {*places.items()})
    if odd:
        raise IntrafuseError(
            "the index and the shards disagree",
            value=odd[0][1],
            layer=odd[0][0],
            remedy="save the model again with save_pretrained",
        )
    return {name: found[shard][name] for name, shard in places.items()}


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file."""
    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for name, (kind, _) in kinds.items():
        if kind not in DTYPES:
            raise IntrafuseError(
                "a checkpoint must hold numbers of 16 bits or more",
                value=kind,
                layer=name,
                remedy="prune the checkpoint before it is quantized",
            )
    return {
        name: StoredTensor(path, name, tuple(shape), DTYPES[kind])
        for name, (kind, shape) in kinds.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Held]) -> str:
    """Write a safetensors file with one tensor in memory at a time, atomically.

    Args:
        path: the file.
        tensors: what it will hold, by name.

    Returns:
        SHA-256 of the file.

    Raises:
        IntrafuseError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_tensors(Path(folder, "one"), {"a": torch.ones(2)})
    ...     tensors_of(Path(folder, "one"))["a"].load()
    tensor([1., 1.])
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digest = hashlib.sha256()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        header = _header({name: tensors[name] for name in ordered})
        digest.update(header)
        file.write(header)
        for name in ordered:
            held = tensors[name]
            content = _content(held if isinstance(held, Tensor) else held.load())
            digest.update(content)
            file.write(content)
            del content
    return digest.hexdigest()


def _header(tensors: Mapping[str, Held]) -> bytes:
    """Make the header: names, dtypes, shapes and places, after its length in 8 bytes."""
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, held in tensors.items():
        end = at + bytes_of(held)
        told[name] = {
            "dtype": NAMES[held.dtype],
            "shape": list(held.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: Tensor) -> memoryview:
    stored = Stored(shape=tuple(tensor.shape), dtype=dtype_name(tensor))
    packed = tensor if tensor.is_contiguous() else pack(tensor, stored)
    return packed.detach().reshape(-1).view(torch.uint8).numpy().data


def _unreadable(path: Path, error: Exception) -> IntrafuseError:
    return IntrafuseError(
        f"the weights cannot be read: the file is missing, truncated, corrupt or no safetensors "
        f"({getattr(error, 'strerror', None) or error})",
        value=str(path),
    )
