"""Save a network to a folder of safetensors and JSON, and load it again, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafuse.catalog.zoo import ZOO, file_sha256
from intrafuse.checkpoint.describe import (
    history,
    identities,
    pruned_axes,
    require_text,
    versions,
)
from intrafuse.checkpoint.loading import (
    WEIGHTS,
    build_saved,
    check_fit,
    read_saved,
    require_finite,
    require_whole,
)
from intrafuse.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    PLAN,
    RECIPE,
    SCHEMA,
    Manifest,
    Stored,
    as_json,
)
from intrafuse.checkpoint.tensors import dtype_name, memory_order, pack
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.result import Pruned
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import folder_target, put_back, replacing_folder
from intrafuse.support.modules import place
from intrafuse.support.reading import read_json
from intrafuse.surgery.hf_config import follow_sizes, has_config, take_fields
from intrafuse.surgery.install import size_changes

__all__ = ["MANIFEST", "PLAN", "WEIGHTS", "load", "save", "usable"]


@apart
def save(
    folder: str | Path,
    pruned: Pruned | nn.Module,
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    source_sha256: str | None = None,
    figures: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Save a network so that `load` restores it bit for bit, without pickling.

    The folder is written under a temporary name and then renamed as a whole, so that a full disk or
    a kill leaves no partial folder. A folder that intrafuse saved before is replaced. It stays
    valid until then; after a kill in between, the next `save` or `load` moves it back. The next
    `save` in the same parent folder removes temporary files.

    Args:
        folder: the target: a new or empty folder, or one that intrafuse saved.
        pruned: the result of `prune`, or a module.
        architecture: a name in the zoo, so that `load(folder)` needs no model; or any other note.
        arguments: the arguments of the architecture's factory, as JSON data.
        source_sha256: SHA-256 of the weights file before pruning
            (`intrafuse.catalog.zoo.file_sha256`).
        figures: measured figures as JSON data, such as {"accuracy": 93.2}.
        plan: the plan of a module that was pruned, and perhaps fine-tuned since. Without a plan, a
            module must have the shapes of its architecture.
        recipe: settings to make the network again, as `Settings.as_data` returns them.

    Returns:
        The folder.

    Raises:
        IntrafuseError: the folder holds other files or cannot be written, the plan or the
            architecture belongs to another network, or a weight is not finite.

    >>> import tempfile
    >>> from intrafuse import prune
    >>> from intrafuse.catalog.zoo import resolve_model
    >>> net = resolve_model("mlp")
    >>> small = prune(net.model, net.example_inputs, channels=0.5)
    >>> with tempfile.TemporaryDirectory() as temporary:
    ...     again = load(save(f"{temporary}/small", small, architecture="mlp"))
    >>> again.layers[1]
    Linear(in_features=64, out_features=64, bias=True)
    """
    check_arguments(
        folder=folder,
        architecture=architecture,
        arguments=arguments,
        source_sha256=source_sha256,
        figures=figures,
    )
    if plan is not None and not isinstance(plan, Plan):
        raise IntrafuseError("plan must be a Plan, or None", value=type(plan).__name__, usage=True)
    seconds = None
    if isinstance(pruned, Pruned):
        model, plan, seconds = pruned.model, plan or pruned.plan, pruned.report.seconds
    else:
        check_arguments(model=pruned)
        model = pruned
    folder = usable(folder)
    tensors, aliases = _state(model)
    require_finite(tensors, dict(model.named_buffers()))
    if plan is not None:
        _require_same(plan, tensors)
    manifest = Manifest(
        schema_version=SCHEMA,
        architecture=architecture,
        arguments=as_json(dict(arguments or {}), "arguments"),
        tensors=_describe(tensors, plan),
        aliases=aliases,
        removed_layers=identities(model),
        figures=as_json(dict(figures or {}), "figures"),
        source_sha256=_digest(source_sha256),
        files={},
        versions=versions(),
        **({} if plan is None else history(plan, plan.seconds if seconds is None else seconds)),
    )
    require_text(manifest)
    if architecture in ZOO:
        check_fit(build_saved(manifest), tensors, manifest)  # fail now rather than in `load`
    with replacing_folder(folder) as temporary:
        packed = {name: pack(tensor, manifest.tensors[name]) for name, tensor in tensors.items()}
        save_file(packed, temporary / WEIGHTS, {"format": "pt"})
        if plan is not None:
            plan.save(temporary / PLAN)
        if recipe is not None:  # every JSON file is YAML
            text = json.dumps(as_json(dict(recipe), "recipe"), indent=2)
            (temporary / RECIPE).write_text(text + "\n", "utf-8")
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        text = manifest.model_copy(update={"files": files}).text()
        (temporary / MANIFEST).write_text(text, "utf-8")
    return folder


@apart
def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a network that `save` wrote, without importing any code that the folder names.

    Args:
        folder: a folder that `save` or `prune_checkpoint` wrote.
        model: the network before pruning, for an architecture outside the zoo. It is changed in
            place, but only if everything in the folder fits it.

    Returns:
        The network in evaluation mode: a new network of the zoo, or `model`.

    Raises:
        IntrafuseError: the folder is missing, truncated, corrupt or pickled, has an unknown schema
            version, or holds NaN or infinity; keys are missing, unexpected or have the wrong shape;
            or the architecture is outside the zoo and there is no `model`.
    """
    check_arguments(folder=folder)
    if model is not None:
        check_arguments(model=model)
    folder = Path(folder)
    put_back(folder)
    if not folder.is_dir():
        raise IntrafuseError(
            "a saved network is a folder, and nothing is unpickled",
            value=str(folder),
            remedy=f"name the folder that holds {MANIFEST}",
        )
    manifest = Manifest.read(folder / MANIFEST)
    tensors = read_saved(folder, manifest)
    target = build_saved(manifest) if model is None else model
    check_fit(target, tensors, manifest)
    old = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    devices = {name: t.device for name, t in old.items() if not t.is_meta}
    default = next(iter(devices.values()), torch.device("cpu"))
    tensors = {name: t.to(devices.get(name, default)) for name, t in tensors.items()}
    standing = identities(target)
    removed = [layer for layer in manifest.removed_layers if layer not in standing]
    saved = folder / PLAN
    plan = None
    if has_config(target) and saved.is_file():
        require_whole(saved, manifest)
        plan = Plan.load(saved)
    config = {}
    if has_config(target) and CONFIG in manifest.files:
        require_whole(folder / CONFIG, manifest)
        config = read_json(folder / CONFIG)
    place(target, tensors, manifest.attributes, removed, manifest.aliases)
    take_fields(target, config)
    if plan is not None:
        follow_sizes(target, size_changes(plan.graph, plan.graph.resized(plan.widths)))
    return target.eval()


# --- saving -------------------------------------------------------------------------------------


def usable(folder: str | Path) -> Path:
    """Return the path of a folder that `save` may write; refuse a folder with other files.

    Raises:
        IntrafuseError: `folder` is a file, or holds files that `save` does not write. The whole
            folder would be replaced.
    """
    folder = folder_target(folder)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        others = sorted(names - {WEIGHTS, MANIFEST, PLAN, RECIPE})
        if others:
            raise IntrafuseError(
                f"the folder holds other files ({', '.join(others[:3])})",
                value=str(folder),
                remedy="choose a new folder",
            )
    return folder


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """List all parameters and buffers by their first name, and the other names of tied ones."""
    first: dict[int, str] = {}
    tensors, aliases = {}, {}
    named = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*named, *model.named_buffers(remove_duplicate=False)]:
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach().cpu()
        else:
            aliases[name] = first[id(tensor)]
    return tensors, aliases


def _require_same(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    for name, shape in plan.shapes().items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise IntrafuseError(
                f"the network must have the shapes of its plan, here {shape}",
                value=tuple(tensors[name].shape),
                layer=name,
                remedy="pass the plan that the network was pruned with",
            )


def _describe(tensors: Mapping[str, Tensor], plan: Plan | None) -> dict[str, Stored]:
    """Describe tensors. A group of one channel counts as pruned, perhaps by an earlier plan."""
    return {
        name: Stored(
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            pruned_axes=() if plan is None else pruned_axes(plan.graph, name),
            order=memory_order(tensor),
        )
        for name, tensor in tensors.items()
    }


def _digest(sha256: str | None) -> str | None:
    if sha256 is not None and (len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef")):
        raise IntrafuseError(
            "source_sha256 must be 64 hexadecimal digits",
            value=sha256,
            remedy="use intrafuse.catalog.zoo.file_sha256",
        )
    return sha256
