"""Read the files of a saved network, and check that they fit a model before changing it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafuse.catalog.zoo import ZOO, file_sha256, from_zoo
from intrafuse.catalog.zoo.weights import is_finite, read_tensors
from intrafuse.checkpoint.manifest import CONFIG, PLAN, Manifest, Stored
from intrafuse.checkpoint.tensors import agrees, dtype_name, unpack
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.modules import held_sizes

__all__ = [
    "BUFFERS",
    "WEIGHTS",
    "build_saved",
    "check_fit",
    "read_saved",
    "require_finite",
    "require_whole",
]

WEIGHTS = "model.safetensors"
BUFFERS = "buffers.safetensors"  # beside shards: what no checkpoint of transformers holds
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
REMEDY = "build the network as it was before pruning, and pass it as model="
PLANLESS = (
    "; if the saved network was pruned, save the result of prune, or pass plan= to save, because a "
    "folder without a plan does not record the pruned axes"
)


def read_saved(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the tensors and check them against the manifest."""
    packed: dict[str, Tensor] = {}
    for name in _files(manifest):
        part = read_tensors(folder / name)
        require_whole(folder / name, manifest)
        twice = sorted(packed.keys() & part.keys())
        if twice:
            raise IntrafuseError("two files hold the same tensor", value=name, layer=twice[0])
        packed |= part
    tensors = {}
    for name in sorted(packed.keys() | manifest.tensors.keys()):
        stored, tensor = manifest.tensors.get(name), packed.get(name)
        if stored is not None and tensor is not None:
            tensors[name] = tensor = unpack(tensor, stored)
        if stored is None or tensor is None or not agrees(tensor, stored):
            given = None if tensor is None else f"{dtype_name(tensor)} {list(tensor.shape)}"
            raise IntrafuseError(
                "the manifest and the weights disagree",
                value=given,
                layer=name,
                remedy="save the network again",
            )
    return tensors


def _files(manifest: Manifest) -> list[str]:
    """Name the files of the tensors: one, or shards; and the buffers of a streamed checkpoint."""
    shards = [name for name in manifest.files if SHARD.fullmatch(name)]
    return [*(sorted(shards) or [WEIGHTS]), *([BUFFERS] if BUFFERS in manifest.files else [])]


def require_whole(path: Path, manifest: Manifest) -> None:
    """Refuse a file whose SHA-256 differs from the manifest."""
    if manifest.files.get(path.name) != file_sha256(path):
        what = {PLAN: "plan is", CONFIG: "configuration is"}.get(path.name)
        what = what or "weights are"
        raise IntrafuseError(
            f"the {what} corrupt, or not what the manifest describes (SHA-256 differs)",
            value=str(path),
            remedy="save the network again",
        )


def build_saved(manifest: Manifest) -> nn.Module:
    """Build an architecture of the zoo, and only of the zoo, on the meta device.

    All tensors come from the folder, so no size in a manifest makes this allocate memory.
    """
    name = manifest.architecture
    if name not in ZOO:
        raise IntrafuseError(
            "only architectures of the zoo can be built from a folder, which must not import code",
            value=name,
            remedy=REMEDY,
        )
    for argument, value in manifest.arguments.items():
        if isinstance(value, list) and len(value) > len(manifest.tensors):
            raise IntrafuseError(
                "an argument of the architecture lists more layers than the folder has tensors",
                value=len(value),
                layer=argument,
                remedy="save the network again",
            )
    with torch.device("meta"):
        return from_zoo(name, manifest.arguments)[0].eval()


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Refuse tensors, names and attributes that do not fit a model, without changing it."""
    owners = dict(model.named_modules(remove_duplicate=False))
    own = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    own.update(buffers)  # type: ignore[arg-type]
    gone = tuple(f"{layer}." for layer in manifest.removed_layers)
    sources = {**{name: name for name in tensors}, **manifest.aliases}
    missing = [name for name in own if name not in sources and not name.startswith(gone)]
    missing += [source for source in sources.values() if source not in tensors]
    unexpected = [name for name in sources if not _can_hold(owners, name)]
    misshapen = []
    for name, source in sources.items():
        if source in tensors and name not in unexpected:
            why = _misfit(tensors[source], own.get(name), manifest.tensors[source])
            misshapen += [f"{name} ({why})"] if why else []
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    if problems:
        raise IntrafuseError(
            f"the saved network does not fit the model; {'; '.join(problems)}",
            remedy=REMEDY if manifest.budget is not None else f"{REMEDY}{PLANLESS}",
        )
    both = sorted(set(manifest.aliases) & set(tensors))
    both += [name for name in sources if name.startswith(gone)]
    if both:
        raise IntrafuseError(
            "the manifest contradicts itself: it lists tensors that are tied or of removed layers",
            layer=", ".join(both),
            remedy="save the network again",
        )
    require_finite(tensors, buffers)
    _check_layers(owners, manifest)


def _check_layers(owners: Mapping[str, nn.Module], manifest: Manifest) -> None:
    """Refuse attributes and removed layers that the model does not have."""
    gone = tuple(f"{layer}." for layer in manifest.removed_layers)
    for path, values in manifest.attributes.items():
        held = {name for name, _, _ in held_sizes(owners[path])} if path in owners else set()
        for attribute in values:
            if attribute not in held:
                raise IntrafuseError(f"the layer has no {attribute}", layer=path, remedy=REMEDY)
    for layer in manifest.removed_layers:
        if not layer or layer not in owners or layer.startswith(gone):
            raise IntrafuseError("the model has no such layer", layer=layer, remedy=REMEDY)


def _can_hold(owners: Mapping[str, nn.Module], name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    owner = owners.get(path)
    return owner is not None and (leaf in owner._parameters or leaf in owner._buffers)


def _misfit(tensor: Tensor, old: Tensor | None, stored: Stored) -> str | None:
    """Say why a tensor cannot replace the model's tensor, or add a missing one; None if it can."""
    if old is None:  # a bias that folding added to a layer without bias
        fits = tensor.is_floating_point() or tensor.is_complex()
        return None if fits else f"file {dtype_name(tensor)}, model has none"
    same = (
        tensor.dim() == old.dim()
        and tensor.is_floating_point() == old.is_floating_point()
        and tensor.is_complex() == old.is_complex()
        and all(
            n == m or (n < m and axis in stored.pruned_axes)
            for axis, (n, m) in enumerate(zip(tensor.shape, old.shape, strict=True))
        )
    )
    if same:
        return None
    return (
        f"file {dtype_name(tensor)} {list(tensor.shape)}, model {dtype_name(old)} {list(old.shape)}"
    )


def require_finite(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and infinity except in buffers such as attention masks."""
    for name, tensor in sorted(tensors.items()):
        mask = name in buffers and not name.rpartition(".")[2].startswith("running_")
        if not is_finite(tensor, infinite=mask):
            raise IntrafuseError("weights must be finite, but NaN or Inf was found", layer=name)
