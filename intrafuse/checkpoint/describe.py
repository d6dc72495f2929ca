"""What the manifest of a saved network says, besides its tensors."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from intrafuse.allocation.budget import Figures
from intrafuse.checkpoint.manifest import Manifest, as_json
from intrafuse.graph.axes import leaves
from intrafuse.graph.groups import ChannelGraph
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.version import __version__

__all__ = ["Planned", "history", "identities", "pruned_axes", "require_text", "versions"]


class Planned(Protocol):
    """A pruning: a plan, or what streaming made."""

    @property
    def graph(self) -> ChannelGraph: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def before(self) -> Figures: ...
    @property
    def after(self) -> Figures: ...


def pruned_axes(graph: ChannelGraph, name: str) -> tuple[int, ...]:
    """List the axes of a tensor that may be smaller than in the architecture."""
    free = {group.id for group in graph.groups}
    free |= {group.id for group in graph.locked if group.size == 1}
    axes = graph.axes.get(name, ())
    return tuple(i for i, tree in enumerate(axes) if free.intersection(leaves(tree)))


def history(planned: Planned, seconds: float) -> dict[str, Any]:
    """Return the requested settings and achieved sizes, as fields of the manifest."""
    keys = ("budget", "method", "importance", "include", "exclude", "seed")
    graph = planned.graph
    return {
        **{key: as_json(planned.settings.get(key), key) for key in keys},
        "attributes": graph.attribute_values(graph.resized(planned.widths)),
        "before": vars(planned.before),
        "after": vars(planned.after),
        "seconds": seconds,
    }


def identities(model: nn.Module) -> tuple[str, ...]:
    """List the layers that were replaced by `nn.Identity`."""
    named = model.named_modules(remove_duplicate=False)
    return tuple(name for name, m in named if name and isinstance(m, nn.Identity))


def require_text(manifest: Manifest) -> None:
    """Refuse lone surrogates in names, because the files cannot hold or restore them.

    Raises:
        IntrafuseError: a name holds one.
    """
    try:
        json.dumps(manifest.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise IntrafuseError(
            "names must be valid Unicode, but a lone surrogate was found",
            value=error.object[max(0, error.start - 20) : error.end + 20],
            remedy="rename the layer, or change the arguments",
        ) from error


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that write a folder."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "intrafuse": __version__,
    }
