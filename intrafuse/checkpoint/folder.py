"""Save a network to a folder of safetensors and JSON, and load it again, bit for bit."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafuse.catalog.zoo import ZOO, file_sha256
from intrafuse.checkpoint.loading import (
    WEIGHTS,
    build_saved,
    check_fit,
    read_saved,
    require_finite,
    require_whole,
)
from intrafuse.checkpoint.manifest import SCHEMA, Manifest, Stored, as_json
from intrafuse.checkpoint.tensors import dtype_name, memory_order, pack
from intrafuse.graph.axes import leaves
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.result import Pruned
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import folder_target, put_back, replacing_folder
from intrafuse.support.modules import place
from intrafuse.support.version import __version__
from intrafuse.surgery.hf_config import follow_sizes, has_config
from intrafuse.surgery.install import size_changes

__all__ = ["MANIFEST", "PLAN", "WEIGHTS", "load", "save", "usable"]

MANIFEST, PLAN, RECIPE = "intrafuse.json", "plan.safetensors", "recipe.yaml"


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
    """Save a network so that `load` gives it back bit for bit; nothing is pickled.

    The folder is written beside its place and put there as a whole: a full disk or a kill leaves
    nothing half-written under its name. One that intrafuse saved before is replaced; until then
    it stays, or is put back by the next `save` or `load`. The next `save` beside it removes what a
    kill left.

    Args:
        folder: where to; new, empty, or saved by intrafuse.
        pruned: what `prune` returned, or a module.
        architecture: a name in the zoo, for `load(folder)` alone; or any other note.
        arguments: what the architecture's factory was called with, as JSON data.
        source_sha256: of the weights before pruning (`intrafuse.catalog.zoo.file_sha256`).
        figures: what was measured, as JSON data, such as {"accuracy": 93.2}.
        plan: of a module that was pruned and is now, say, fine-tuned. Without it a module must
            have the shapes of its architecture.
        recipe: settings that make the network again, as `Settings.as_data` gives them.

    Returns:
        The folder.

    Raises:
        IntrafuseError: the folder holds other files or cannot be written; the plan or the
            architecture is that of another network; NaN or Inf in the weights.

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
        removed_layers=_identities(model),
        figures=as_json(dict(figures or {}), "figures"),
        source_sha256=_digest(source_sha256),
        files={},
        versions=_versions(),
        **_history(plan, seconds),
    )
    _require_text(manifest)
    if architecture in ZOO:
        check_fit(build_saved(manifest), tensors, manifest)  # refuse now what `load` would refuse
    with replacing_folder(folder) as temporary:
        packed = {name: pack(tensor, manifest.tensors[name]) for name, tensor in tensors.items()}
        save_file(packed, temporary / WEIGHTS, {"format": "pt"})
        if plan is not None:
            plan.save(temporary / PLAN)
        if recipe is not None:  # JSON is YAML
            text = json.dumps(as_json(dict(recipe), "recipe"), indent=2)
            (temporary / RECIPE).write_text(text + "\n", "utf-8")
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        text = manifest.model_copy(update={"files": files}).text()
        (temporary / MANIFEST).write_text(text, "utf-8")
    return folder


@apart
def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a network that `save` wrote. No code that the folder names is imported.

    Args:
        folder: what `save` wrote.
        model: the network before pruning, for an architecture outside the zoo. It is changed in
            place, and only when everything in the folder fits it.

    Returns:
        The network in evaluation mode: a new one of the zoo, or `model`.

    Raises:
        IntrafuseError: the folder is missing, truncated, corrupt or pickled, has an unknown
            schema version, holds NaN or Inf; missing, unexpected or misshapen keys; an
            architecture outside the zoo, and no `model`.
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
            remedy=f"give the folder that holds {MANIFEST}",
        )
    manifest = Manifest.read(folder / MANIFEST)
    tensors = read_saved(folder, manifest)
    target = build_saved(manifest) if model is None else model
    check_fit(target, tensors, manifest)
    old = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    devices = {name: t.device for name, t in old.items() if not t.is_meta}
    default = next(iter(devices.values()), torch.device("cpu"))
    tensors = {name: t.to(devices.get(name, default)) for name, t in tensors.items()}
    standing = _identities(target)
    removed = [layer for layer in manifest.removed_layers if layer not in standing]
    saved = folder / PLAN
    plan = None
    if has_config(target) and saved.is_file():
        require_whole(saved, manifest)
        plan = Plan.load(saved)
    place(target, tensors, manifest.attributes, removed, manifest.aliases)
    if plan is not None:
        follow_sizes(target, size_changes(plan.graph, plan.graph.resized(plan.widths)))
    return target.eval()


# --- saving -------------------------------------------------------------------------------------


def usable(folder: str | Path) -> Path:
    """Return a folder that `save` may write, and refuse one with files of somebody else.

    Raises:
        IntrafuseError: it would be replaced as a whole, and it holds other files, or is a file.
    """
    folder = folder_target(folder)
    if folder.is_dir():
        others = sorted({path.name for path in folder.iterdir()} - {WEIGHTS, MANIFEST, PLAN})
        if others:
            raise IntrafuseError(
                f"the folder holds other files ({', '.join(others[:3])})",
                value=str(folder),
                remedy="choose a new folder",
            )
    return folder


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """List every parameter and buffer under its first name, and the other names of tied ones."""
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
                f"the network must have the shapes that its plan gives, here {shape}",
                value=tuple(tensors[name].shape),
                layer=name,
                remedy="give the plan that the network was pruned with",
            )


def _describe(tensors: Mapping[str, Tensor], plan: Plan | None) -> dict[str, Stored]:
    """Describe tensors; a group of one channel may have been pruned by an earlier plan."""
    axes = {} if plan is None else plan.graph.axes
    free: set[int] = set()
    if plan is not None:
        free = {g.id for g in plan.graph.groups}
        free |= {g.id for g in plan.graph.locked if g.size == 1}
    return {
        name: Stored(
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            pruned_axes=tuple(
                i for i, tree in enumerate(axes.get(name, ())) if free.intersection(leaves(tree))
            ),
            order=memory_order(tensor),
        )
        for name, tensor in tensors.items()
    }


def _identities(model: nn.Module) -> tuple[str, ...]:
    named = model.named_modules(remove_duplicate=False)
    return tuple(name for name, m in named if name and isinstance(m, nn.Identity))


def _history(plan: Plan | None, seconds: float | None) -> dict[str, Any]:
    """Say what the pruning was asked for and did, in the manifest's fields."""
    if plan is None:
        return {}
    keys = ("budget", "method", "importance", "include", "exclude", "seed")
    return {
        **{key: as_json(plan.settings.get(key), key) for key in keys},
        "attributes": plan.graph.attribute_values(plan.graph.resized(plan.widths)),
        "before": vars(plan.before),
        "after": vars(plan.after),
        "seconds": plan.seconds if seconds is None else seconds,
    }


def _require_text(manifest: Manifest) -> None:
    """Refuse halves of characters: the files cannot hold them, or could not be read again."""
    try:
        json.dumps(manifest.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise IntrafuseError(
            "names must be whole characters, but a surrogate was found",
            value=error.object[max(0, error.start - 20) : error.end + 20],
            remedy="rename the layer, or what the arguments hold",
        ) from error


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "intrafuse": __version__,
    }


def _digest(sha256: str | None) -> str | None:
    if sha256 is not None and (len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef")):
        raise IntrafuseError(
            "source_sha256 must be 64 hexadecimal digits",
            value=sha256,
            remedy="use intrafuse.catalog.zoo.file_sha256",
        )
    return sha256
