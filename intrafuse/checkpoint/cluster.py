"""Plan the groups of a checkpoint as tasks of a Ray cluster that reads it from shared storage."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from intrafuse.checkpoint.source import Source
from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods import Method
from intrafuse.pruning.each_group import in_order, map_of, responsible
from intrafuse.pruning.prepare import Prepared
from intrafuse.pruning.settings import Settings
from intrafuse.support.cluster import connected
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["planned_by_ray", "require_independent"]

AHEAD = 2  # tasks for each core that are submitted before their maps are needed


def require_independent(asked: Settings) -> None:
    """Refuse settings by which the map of a group depends on those of other groups."""
    if asked.repair == "analytic" or not asked.compression.independent:
        raise IntrafuseError(
            "groups can be planned apart only if their maps do not depend on each other",
            value=asked.compression.name,
            usage=True,
            remedy="use select or intra-fusion, without repair",
        )


@contextmanager
def planned_by_ray(
    asked: Settings,
    folder: Path,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    widths: Mapping[str, int],
    address: str | None = None,
) -> Generator[Method]:
    """Plan groups on a cluster, and give a method that waits for their maps.

    Args:
        asked: the settings; their method must be independent.
        folder: the checkpoint, at the same path on every node.
        groups: those to plan.
        scores, widths: by group name.
        address: of the cluster. None uses the running Ray, or starts it on this machine.

    Raises:
        IntrafuseError: Ray is not installed, or cannot be reached or started.
    """
    with connected(address) as ray:
        yield _Waiting(ray, asked, folder, groups, scores, widths)


class _Waiting(Method):
    """A method whose maps are computed by tasks; only a few are submitted ahead of their use."""

    def __init__(
        self,
        ray: Any,
        asked: Settings,
        folder: Path,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        widths: Mapping[str, int],
    ) -> None:
        method = asked.compression
        self.name, self.order, self.chooses = method.name, method.order, method.chooses  # type: ignore[misc]
        self._ray = ray
        self._remote = ray.remote(num_cpus=1)(_planned)
        self._given = str(folder), ray.put(asked)
        self._scores, self._widths = scores, widths
        shrinking = in_order(method, groups, widths)
        self._next = iter([g for g in shrinking if responsible(method, g) is method])
        self._waiting: dict[str, Any] = {}

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Wait for the map of a group."""
        self._submit()
        try:
            tensors, note = self._ray.get(self._waiting.pop(group.name))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, IntrafuseError):
                raise error.cause from error
            raise
        return replace(MergeMap.from_tensors(group.name, tensors), note=note)

    def _submit(self) -> None:
        most = AHEAD * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        while len(self._waiting) < most and (group := next(self._next, None)) is not None:
            name = group.name
            told = name, self._scores[name], self._widths[name]
            self._waiting[name] = self._remote.remote(*self._given, *told)


def _planned(
    folder: str, asked: Settings, name: str, scores: Tensor, width: int
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Plan one group in a worker; return the map's tensors and its note."""
    ready = _ready(folder, asked)
    group = next(group for group in ready.groups if group.name == name)
    merge_map = map_of(asked.compression, group, scores, width, ready.context)
    return merge_map.tensors(), dict(merge_map.note)


_KNOWN: dict[tuple[str, str], Prepared] = {}


def _ready(folder: str, asked: Settings) -> Prepared:
    """Return a checkpoint that is ready to be planned; a worker traces it once."""
    key = folder, repr(asked)
    if key not in _KNOWN:
        _KNOWN.clear()
        _KNOWN[key] = Source.of(Path(folder)).prepared(asked)
    return _KNOWN[key]
