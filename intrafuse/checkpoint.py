"""Save a network to a folder of safetensors and JSON, and load it again, bit for bit."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import intrafuse
from intrafuse.config import follow_sizes, has_config
from intrafuse.errors import IntrafuseError
from intrafuse.files import replacing_folder
from intrafuse.graph.axes import leaves
from intrafuse.manifest import SCHEMA, Manifest, Stored, as_json
from intrafuse.modules import held_sizes, place
from intrafuse.plan import Plan
from intrafuse.prune import Pruned
from intrafuse.storage import agrees, dtype_name, memory_order, pack, unpack
from intrafuse.surgery import size_changes
from intrafuse.zoo import ZOO, file_sha256, from_zoo
from intrafuse.zoo.weights import is_finite, read_tensors

__all__ = ["MANIFEST", "PLAN", "WEIGHTS", "load", "save", "usable"]

WEIGHTS, MANIFEST, PLAN = "model.safetensors", "intrafuse.json", "plan.safetensors"
REMEDY = "build the network that was pruned, before pruning, and give it as model="
PLANLESS = (
    ", or, if it was pruned, save what prune returned or give save its plan=: without a plan a "
    "folder does not say what was pruned"
)


def save(
    folder: str | Path,
    pruned: Pruned | nn.Module,
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    source_sha256: str | None = None,
    figures: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
) -> Path:
    """Save a network so that `load` gives it back bit for bit; nothing is pickled.

    The folder is written under a temporary name and renamed, so that a full disk or a kill leaves
    nothing half-written under its own name. One that intrafuse saved before is replaced.

    Args:
        folder: where to; new, empty, or saved by intrafuse.
        pruned: what `prune` returned, or a module.
        architecture: a name in the zoo, for `load(folder)` alone; or any other note.
        arguments: what the architecture's factory was called with, as JSON data.
        source_sha256: of the weights before pruning (`intrafuse.zoo.file_sha256`).
        figures: what was measured, as JSON data, such as {"accuracy": 93.2}.
        plan: of a module that was pruned and is now, say, fine-tuned. Without it a module must
            have the shapes of its architecture.

    Returns:
        The folder.

    Raises:
        IntrafuseError: the folder holds other files or cannot be written; the plan or the
            architecture is that of another network; NaN or Inf in the weights.

    >>> import tempfile
    >>> from intrafuse import prune
    >>> net = resolve_model("mlp")
    >>> small = prune(net.model, net.example_inputs, channels=0.5)
    >>> with tempfile.TemporaryDirectory() as temporary:
    ...     again = load(save(f"{temporary}/small", small, architecture="mlp"))
    >>> again.layers[1]
    Linear(in_features=64, out_features=64, bias=True)
    """
    seconds = None
    if isinstance(pruned, Pruned):
        model, plan, seconds = pruned.model, plan or pruned.plan, pruned.report.seconds
    else:
        model = pruned
    folder = usable(folder)
    tensors, aliases = _state(model)
    _require_finite(tensors, dict(model.named_buffers()))
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
    if architecture in ZOO:
        _check(_build(manifest), tensors, manifest)  # refuse now what `load` would refuse
    with replacing_folder(folder) as temporary:
        packed = {name: pack(tensor, manifest.tensors[name]) for name, tensor in tensors.items()}
        save_file(packed, temporary / WEIGHTS, {"format": "pt"})
        if plan is not None:
            plan.save(temporary / PLAN)
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        text = manifest.model_copy(update={"files": files}).text()
        (temporary / MANIFEST).write_text(text, "utf-8")
    return folder


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
    folder = Path(folder)
    if not folder.is_dir():
        raise IntrafuseError(
            "a saved network is a folder, and nothing is unpickled",
            value=str(folder),
            remedy=f"give the folder that holds {MANIFEST}",
        )
    manifest = Manifest.read(folder / MANIFEST)
    tensors = _read(folder, manifest)
    target = _build(manifest) if model is None else model
    _check(target, tensors, manifest)
    old = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    devices = {name: t.device for name, t in old.items() if not t.is_meta}
    default = next(iter(devices.values()), torch.device("cpu"))
    tensors = {name: t.to(devices.get(name, default)) for name, t in tensors.items()}
    standing = _identities(target)
    removed = [layer for layer in manifest.removed_layers if layer not in standing]
    saved = folder / PLAN
    plan = None
    if has_config(target) and saved.is_file():
        _require_whole(saved, manifest)
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
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise IntrafuseError("the output must be a folder, but it is a file", value=str(folder))
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


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "intrafuse": intrafuse.__version__,
    }


def _digest(sha256: str | None) -> str | None:
    if sha256 is not None and (len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef")):
        raise IntrafuseError(
            "source_sha256 must be 64 hexadecimal digits",
            value=sha256,
            remedy="use intrafuse.zoo.file_sha256",
        )
    return sha256


# --- loading ------------------------------------------------------------------------------------


def _read(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the tensors, and check them against the manifest."""
    path = folder / WEIGHTS
    packed = read_tensors(path)
    _require_whole(path, manifest)
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


def _require_whole(path: Path, manifest: Manifest) -> None:
    """Refuse a file that is not the one that was saved."""
    if manifest.files.get(path.name) != file_sha256(path):
        what = "weights are" if path.name == WEIGHTS else "plan is"
        raise IntrafuseError(
            f"the {what} corrupt, or not what the manifest describes (SHA-256 differs)",
            value=str(path),
            remedy="save the network again",
        )


def _build(manifest: Manifest) -> nn.Module:
    """Build an architecture of the zoo, and no other, on the meta device.

    Its tensors all come from the folder: whatever sizes a manifest asks for, none is allocated.
    """
    name = manifest.architecture
    if name not in ZOO:
        raise IntrafuseError(
            "only architectures of the zoo are built from a folder, which must not import code",
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


def _check(model: nn.Module, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Refuse tensors, names and attributes that do not fit a model; change nothing."""
    owners = dict(model.named_modules(remove_duplicate=False))
    wanted = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    wanted.update(buffers)  # type: ignore[arg-type]
    gone = tuple(f"{layer}." for layer in manifest.removed_layers)
    sources = {**{name: name for name in tensors}, **manifest.aliases}
    missing = [name for name in wanted if name not in sources and not name.startswith(gone)]
    missing += [source for source in sources.values() if source not in tensors]
    unexpected = [name for name in sources if not _can_hold(owners, name)]
    misshapen = []
    for name, source in sources.items():
        if source in tensors and name not in unexpected:
            why = _misfit(tensors[source], wanted.get(name), manifest.tensors[source])
            misshapen += [f"{name} ({why})"] if why else []
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise IntrafuseError(
            f"the saved network does not fit the model; {'; '.join(found)}",
            remedy=REMEDY if manifest.budget is not None else f"{REMEDY}{PLANLESS}",
        )
    both = sorted(set(manifest.aliases) & set(tensors))
    both += [name for name in sources if name.startswith(gone)]
    if both:
        raise IntrafuseError(
            "the manifest contradicts itself: it lists tensors that are tied, or of removed layers",
            layer=", ".join(both),
            remedy="save the network again",
        )
    _require_finite(tensors, buffers)
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
    """Say why a tensor cannot take the place of the model's own, or of an absent one."""
    if old is None:  # a bias that folding gave to a layer without one
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


def _require_finite(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and Inf but in buffers such as attention masks."""
    for name, tensor in sorted(tensors.items()):
        mask = name in buffers and not name.rpartition(".")[2].startswith("running_")
        if not is_finite(tensor, infinite=mask):
            raise IntrafuseError("weights must be finite, but NaN or Inf was found", layer=name)
