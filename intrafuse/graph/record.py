"""Record the operators of a model's code by name, shapes and numbers only.

An export keeps of each operator its place in the code and a copy of its result with all it knows.
That is most of the export's time, and trials at other sizes read none of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.utils._pytree import tree_leaves

from intrafuse.graph.typed import is_several

__all__ = ["CONSTANT", "Each", "record_lightly"]

CONSTANT = "constant"  # key in a node's meta: the tensor that the code made from numbers
Each = Callable[[Graph], None]  # called after each operator, with all operators so far
GETITEM = "call_function", operator.getitem
aten = torch.ops.aten


def record_lightly(each: Each | None = None) -> None:
    """Let the running export record from here on only what a comparison of operators reads.

    The export must be stopped in the end, because its graph is no program.

    Args:
        each: called after each operator; it may raise an exception to stop the model.
    """
    mode = get_proxy_mode()
    if mode is not None:
        # On the instance, because operators of higher order look for the class of the mode.
        setattr(mode, "__torch_dispatch__", _Recorder(mode, each))  # noqa: B010


class _Recorder:
    """Adds operators to the graph of an export.

    Attributes:
        mode: the export's own recorder, which knows parameters and inputs.
        graph: the operators so far.
        each: called after each operator.
        made: id of a tensor -> the nodes that gave it, and the tensor, so that no id is reused.
    """

    def __init__(self, mode: Any, each: Each | None) -> None:
        self.mode = mode
        self.graph: Graph = mode.tracer.graph
        self.each = each
        self.made: dict[int, tuple[list[Node], Tensor]] = {}

    def __call__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, and record it as an export does."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if _has(func, torch.Tag.data_dependent_output):
            if _known(args, kwargs):
                return func(*args, **kwargs)
            self._hand_over()
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        if func is aten.is_nonzero.default:
            with self.mode:
                return (args[0] != 0).item()
        if func is aten.lift_fresh.default:
            func = aten.lift_fresh_copy.default
        operands = self._operand(args), {k: self._operand(v) for k, v in kwargs.items()}
        node = self.graph.create_node("call_function", func, *operands)
        if _has(func, torch.Tag.inplace_view):
            self._keep_shapes(_tensors(args, kwargs))
        result = func(*args, **kwargs)
        self._note(result, node)
        if _has(func, torch.Tag.dynamic_output_shape) and _is_symbolic(result):
            self._hand_over()
        elif self.each is not None:
            with unset_fake_temporarily():  # it may read the numbers of constants
                self.each(self.graph)
        return result

    def _hand_over(self) -> None:
        """Let the export record from here on: unknown numbers of tensors are symbols."""
        tracer = self.mode.tracer
        for nodes, tensor in self.made.values():
            if tensor not in tracer.tensor_tracker:
                proxy = Proxy(nodes[-1], tracer)
                track_tensor_tree(tensor, proxy, constant=None, tracer=tracer)
        del self.mode.__torch_dispatch__

    def _keep_shapes(self, tensors: Iterable[Tensor]) -> None:
        """Let earlier operators keep the shapes of tensors that change their shape in place."""
        for tensor in tensors:
            kept = tensor.detach()
            for node in self.made[id(tensor)][0]:
                value = node.meta["val"]
                if is_several(value):
                    node.meta["val"] = [kept if item is tensor else item for item in value]
                elif value is tensor:
                    node.meta["val"] = kept

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if is_several(value):
            return tuple(map(self._operand, value))
        return value

    def _node(self, tensor: Tensor) -> Node:
        """Return the node that made a tensor; a tensor from elsewhere is a constant."""
        if id(tensor) not in self.made:
            known = self.mode.tracer.tensor_tracker.get(tensor)
            if known is None:
                node = self.graph.create_node("get_attr", CONSTANT)
                node.meta.update({"val": tensor, CONSTANT: tensor})
            else:
                node = known.proxy.node
            self.made[id(tensor)] = [node], tensor
        return self.made[id(tensor)][0][-1]

    def _note(self, result: Any, *nodes: Node) -> None:
        """Note what a node made; of several results, each is taken by a node of its own."""
        nodes[-1].meta["val"] = result
        if isinstance(result, Tensor):
            self.made.setdefault(id(result), ([], result))[0].extend(nodes)
        elif is_several(result):
            for i, item in enumerate(result):
                self._note(item, *nodes, self.graph.create_node(*GETITEM, (nodes[-1], i)))


@cache
def _has(func: Any, tag: torch.Tag) -> bool:
    return tag in func.tags


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _known(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether all numbers are known; a program then holds them, not the operator."""
    return all(getattr(tensor, CONSTANT, None) is not None for tensor in _tensors(args, kwargs))


def _is_symbolic(result: Any) -> bool:
    """Tell whether a size of a result is unknown."""
    sizes = [n for tensor in tree_leaves(result) for n in getattr(tensor, "shape", ())]
    return any(isinstance(n, torch.SymInt) for n in sizes)
