"""The operators of a traced model, with the axes of their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from intrafuse.graph.axes import Tree

if TYPE_CHECKING:
    from intrafuse.graph.export import ExampleInputs

__all__ = ["Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced model.

    Attributes:
        nodes: the operators, in order of execution.
        values: the trees of each result; a list of lists for an operator with several results.
        parameters: the node of each parameter and buffer -> its name.
        scales: numbers in the code that follow a size: operator -> (tree of the size, exponent).
        starts: slice -> tree of the positions before the slice.
        example_inputs: the inputs that the model was traced with.
    """

    nodes: tuple[Node, ...]
    values: Mapping[Node, Any]
    parameters: Mapping[Node, str]
    scales: Mapping[Node, tuple[Tree, float]]
    starts: Mapping[Node, Tree]
    example_inputs: ExampleInputs

    def parameter(self, value: object) -> str:
        """Return the name of the parameter or buffer that a node stands for; else no name, ""."""
        return self.parameters.get(value, "")  # type: ignore[arg-type]
