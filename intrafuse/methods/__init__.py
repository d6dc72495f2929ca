"""Methods: scores and a width -> the merge map of one group. One file each, listed here."""

from __future__ import annotations

from difflib import get_close_matches
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods.auto import Auto
from intrafuse.methods.folding import Folding
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.moment import Moment
from intrafuse.methods.select import Select
from intrafuse.support.errors import IntrafuseError
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = [
    "METHODS",
    "Auto",
    "Folding",
    "IntraFusion",
    "Method",
    "Moment",
    "Select",
    "resolve_method",
]


class Method(Protocol):
    """A compression method: a frozen dataclass whose fields are its settings.

    Attributes:
        name: its name on the command line.
        folds_batchnorm: whether batch norm is folded before the method looks at the weights.
        order: whether groups are handed over from the input to the output (`forward`) or from
            the output, index 0, to the input (`backward`).
    """

    name: ClassVar[str]
    folds_batchnorm: ClassVar[bool]
    order: ClassVar[Literal["forward", "backward"]]

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        """Return the map that reduces a group with scores (n,) to `width` channels."""
        ...


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Select, IntraFusion, Folding, Moment, Auto)
}


def resolve_method(method: str | Method) -> Method:
    """Turn a name into the method with its default settings.

    Raises:
        IntrafuseError: no method has that name, or it is not a method.

    >>> resolve_method("intra-fusion").p
    1.0
    """
    if not isinstance(method, str):
        known = callable(method) and hasattr(method, "folds_batchnorm")
        if not known or isinstance(method, type):
            raise IntrafuseError(
                "method must be a name or a method with settings, such as IntraFusion(p=2)",
                value=method,
                usage=True,
            )
        return method
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1, cutoff=0.3)
        names = ", ".join(METHODS)
        raise IntrafuseError(
            f"method must be one of {names}",
            value=method,
            usage=True,
            remedy=f"did you mean {near[0]}?" if near else None,
        )
    return METHODS[method]()
