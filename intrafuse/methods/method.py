"""The contract of a compression method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["Method"]


class Method(ABC):
    """A compression method: scores and a width -> the merge map of one group.

    A method is a frozen dataclass whose fields are its settings. The fields, with their types and
    defaults, are also what the command line and recipes accept. Laws:

    - the map has the group's size and the requested width;
    - the same group, scores, weights and seed give the same map;
    - a method has no side effects: neither `context.weights` nor the model changes;
    - if `width` equals the group's size, the map does not change the network's outputs.

    Attributes:
        name: its name on the command line and in reports.
        folds_batchnorm: whether batch norm is folded into its preceding layer before the method
            is called.
        order: order of the groups: from input to output (`forward`), or from the output, index 0,
            to the input (`backward`).
        chooses: whether the method itself selects channels in groups that must not be combined
            (`ChannelGroup.chosen`); otherwise these are selected by importance.

    >>> import torch, intrafuse
    >>> class First(Method):
    ...     name = "first"
    ...     def __call__(self, group, scores, width, context):
    ...         return MergeMap.select(group.name, group.size, torch.arange(width))
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> intrafuse.plan(net, torch.zeros(1, 4), channels=0.5, method=First()).widths
    {'0': 4}
    """

    name: ClassVar[str]
    folds_batchnorm: ClassVar[bool] = False
    order: ClassVar[Literal["forward", "backward"]] = "backward"
    chooses: ClassVar[bool] = False

    @property
    def independent(self) -> bool:
        """Whether the map of a group follows from its scores and the original weights alone."""
        return False

    @abstractmethod
    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Return the map that reduces a group with scores (n,) to `width` channels."""

    def solved(self, maps: Sequence[MergeMap], context: Context) -> dict[str, Tensor]:
        """Return tensors that replace those of the network after all maps, by name.

        It is called once, when all groups of `context.weights` are merged. Most methods replace
        none.
        """
        return {}

    def as_data(self) -> dict[str, Any]:
        """Return the name and the settings as JSON data."""
        settings = asdict(self) if is_dataclass(self) else {}  # type: ignore[call-overload]
        return {"name": self.name, **settings}
