"""Run a masked network whose norms compute their statistics over the kept channels only.

A norm over masked channels counts zeros: they would pull the mean of layer norm towards zero, and
eps would weigh more beside the smaller variance. This module runs the operators one by one and
computes norms by definition: the mean over the kept channels, their sum of squares divided by the
number of all channels, and eps times the kept share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree

from intrafuse.graph.axes import Tree, locate, tree_size
from intrafuse.graph.blocks import positions
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.rules import arguments, operator_name
from intrafuse.graph.rules.registry import CASTS
from intrafuse.graph.sizes.compare import calls
from intrafuse.graph.trace import ExampleInputs, as_arguments, export_program, trace

if TYPE_CHECKING:
    from intrafuse.pruning.plan import Plan

__all__ = ["Reference", "placed", "run_reference"]


def run_reference(masked: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> Any:
    """Run a masked network.

    Args:
        masked: a copy of the original with the dropped channels masked.
        plan: the plan of `select` that drops them.
        example_inputs: inputs of the network.

    Returns:
        The output of the network.
    """
    graph = plan.graph
    program = export_program(masked, example_inputs)
    if graph.traced is None or not _alike(program, graph.traced.nodes):
        graph = trace(masked, example_inputs, include=list(graph.by_name))
    runner = Reference(program, graph, plan)
    with torch.no_grad():
        flat = runner.run(*placed(program, example_inputs))
    wanted = len(program.graph_signature.user_outputs)
    spec = program.call_spec.out_spec
    assert spec is not None
    return _pytree.tree_unflatten([*flat][len(flat) - wanted :], spec)


def _alike(program: ExportedProgram, nodes: Sequence[Node]) -> bool:
    """Tell whether a program runs the traced operators; those of a loaded plan may differ."""
    names = [[*map(operator_name, calls(some))] for some in (program.graph.nodes, nodes)]
    return names[0] == names[1]


def placed(program: ExportedProgram, example_inputs: ExampleInputs) -> list[Any]:
    """List the tensors for the placeholders of a program, in their order."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    tensors = {**program.state_dict, **program.constants}
    given = iter(_pytree.tree_leaves(as_arguments(example_inputs)))
    values = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name) or constants.get(node.name)
            values.append(next(given) if name is None else tensors[name])
    return values


class Reference(fx.Interpreter):
    """An interpreter that locates channels and computes norms by definition."""

    def __init__(self, program: ExportedProgram, graph: ChannelGraph, plan: Plan) -> None:
        super().__init__(program.graph_module)
        both = calls(program.graph.nodes), calls(graph.program.nodes)
        self.known = dict(zip(*both, strict=True))
        self.channels = graph
        self.gone: dict[int, Tensor] = {}  # atom -> its dropped channels
        for merge_map in plan.maps:
            stays = torch.zeros(merge_map.size, dtype=torch.bool)
            stays[merge_map.keep] = True  # type: ignore[index]
            self.gone[graph.by_name[merge_map.group].id] = (~stays).nonzero()[:, 0]
        self.share: dict[Node, float] = {}  # mean over channels -> kept share

    def run_node(self, n: Node) -> Any:
        """Run an operator, or compute a norm."""
        name = operator_name(n) if n.op == "call_function" else ""
        if name in ("layer_norm", "rms_norm"):
            stays = self._stays(n, -1)
            if stays is not None:
                return self._norm(n, name, stays)
        elif name == "mean":
            dims = arguments(n)["dim"]
            stays = self._stays(n, dims[0]) if dims and len(dims) == 1 else None
            if stays is not None:
                self.share[n] = len(stays) / self._input(n).shape[dims[0]]
                x = self._input(n).index_select(dims[0], stays)
                return x.mean(dims, keepdim=True) * self.share[n]
        elif n.all_input_nodes[:1] and n.all_input_nodes[0] in self.share:
            share = self.share[n.all_input_nodes[0]]
            if name in CASTS:
                self.share[n] = share
            elif name == "add":
                (eps,) = (a for a in n.args if isinstance(a, int | float))
                return self.env[n.all_input_nodes[0]] + eps * share
        return super().run_node(n)

    def staying(self, known: Node, value: Tensor) -> Tensor:
        """Remove the dropped channels from the result of a traced operator."""
        for dim, tree in enumerate(self.channels.program.values[known]):
            stays = self._positions(tree, value)
            if stays is not None:
                value = value.index_select(dim, stays)
        return value

    def _input(self, n: Node) -> Tensor:
        return self.env[n.all_input_nodes[0]]

    def _stays(self, n: Node, dim: int) -> Tensor | None:
        """List the kept positions along a dimension of an operator's input; None for all."""
        values = self.channels.program.values[self.known[n].all_input_nodes[0]]
        return self._positions(values[dim], self._input(n))

    def _positions(self, tree: Tree, x: Tensor) -> Tensor | None:
        gone = []
        for atom, channels in self.gone.items():
            blocks = locate(tree, atom, self.channels.sizes)
            if blocks:
                lies = torch.from_numpy(positions(blocks, self.channels.sizes[atom]))
                gone.append(lies[channels].flatten())
        if not gone:
            return None
        stays = torch.ones(tree_size(tree, self.channels.sizes), dtype=torch.bool)
        stays[torch.cat(gone)] = False
        return stays.nonzero()[:, 0].to(x.device)

    def _norm(self, n: Node, name: str, stays: Tensor) -> Tensor:
        """Compute layer norm or RMS norm over the last dimension; dropped positions are zero."""
        given = arguments(n).items()
        args = {k: self.env[v] if isinstance(v, Node) else v for k, v in given}
        x, share = args["input"], len(stays) / args["input"].shape[-1]
        z = x.index_select(-1, stays)
        if name == "layer_norm":
            z = z - z.mean(-1, keepdim=True)
        eps = torch.finfo(x.dtype).eps if args["eps"] is None else args["eps"]
        z = z / ((z.square().sum(-1, keepdim=True) / x.shape[-1] + share * eps).sqrt())
        z = z * args["weight"][stays]
        if args.get("bias") is not None:
            z = z + args["bias"][stays]
        return torch.zeros_like(x).index_copy(-1, stays, z)
