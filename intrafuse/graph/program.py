"""The operators that a model was traced to, with the axes of their results."""

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
        values: the trees of each result; of an operator with several results, a list of lists.
        parameters: the names of parameters and buffers, by the node that stands for them.
        scales: numbers in the code that follow a size: operator -> (tree of the size, exponent).
        starts: what lies before each slice: operator -> tree.
        example_inputs: what the model was traced with.
    """

    nodes: tuple[Node, ...]
    values: Mapping[Node, Any]
    parameters: Mapping[Any, Any]
    scales: Mapping[Node, tuple[Tree, float]]
    starts: Mapping[Node, Tree]
    example_inputs: ExampleInputs
