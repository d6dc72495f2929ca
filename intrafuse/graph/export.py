"""Export a model in evaluation mode, and explain where an export fails."""

from __future__ import annotations

import io
import linecache
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.backends.mha
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from intrafuse.graph.record import CONSTANT, Each, record_lightly
from intrafuse.support import errors
from intrafuse.support.calls import alone, as_called
from intrafuse.support.device import require_numbers
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.snapshot import same_random_state, unchanged

__all__ = [
    "CONSTANT",
    "ExampleInputs",
    "as_arguments",
    "caching",
    "evaluating",
    "export_program",
    "failing_line",
    "plainly",
    "record",
    "recorded",
]

REGIONS = frozenset(("wrap_with_autocast", "wrap_with_set_grad_enabled"))
# Modules that inspect a mask unless an argument says whether it is causal: its name and position.
STACKS = {nn.TransformerEncoder: ("is_causal", 3), nn.TransformerDecoder: ("tgt_is_causal", 6)}
ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn example inputs (a tensor, a tuple of args or a mapping of kwargs) into (args, kwargs).

    Each tensor is copied once, because a model may compute in place.
    """
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            trained = tensor.requires_grad
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(trained)
        return copies[id(tensor)]

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        args = (example_inputs,)
    return tree_map_only(Tensor, copy, (args, kwargs))


@contextmanager
def evaluating(model: nn.Module, *, exporting: bool = False) -> Generator[nn.Module]:
    """Run a model in evaluation mode, one thread at a time, then restore its state.

    `unchanged` restores everything that the model's code caches in attributes or counts. The global
    random generators are restored, too. `exporting` means that the code computes only with shapes.
    """
    with alone(), same_random_state(model), unchanged(model, values=not exporting):
        model.eval()
        yield model


def export_program(
    model: object, example_inputs: ExampleInputs, *, cached: bool = False
) -> torch.export.ExportedProgram:
    """Export a model in evaluation mode, without changing it.

    With `cached` the model builds a cache for its next call, if it does so by default.

    Raises:
        IntrafuseError: `model` is not a module, or cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise IntrafuseError("the model must be a torch.nn.Module", value=type(model).__name__)
    _require_one_kind_of_place(model)
    args, kwargs = as_arguments(example_inputs)
    try:
        mode = nullcontext() if cached else plainly(model)
        with evaluating(model, exporting=True):
            return _export(model, args, kwargs, mode)
    except NotImplementedError as error:  # an exported program has no eval()
        raise IntrafuseError(
            f"the model cannot be put in evaluation mode: {error}",
            remedy="pass the original module, not the exported one",
        ) from error


def _require_one_kind_of_place(model: nn.Module) -> None:
    """Refuse a model with some, but not all, parameters on the meta device."""
    named = dict(model.named_parameters())
    meta = [name for name, parameter in named.items() if parameter.device.type == "meta"]
    if 0 < len(meta) < len(named):
        require_numbers(meta[0], named[meta[0]])


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: AbstractContextManager[None],
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the graph of a failed export to standard error
    try:
        with (
            torch.no_grad(),
            redirect_stderr(printed),
            _without_warnings(),
            mode,
            as_called(),
        ):
            program = torch.export.export(model, args, kwargs, strict=False)
    except SystemExit as error:
        raise IntrafuseError(
            f"the network's own code ended the program; got exit({error.code!r})"
        ) from error
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        operator = _last_operator(error)
        raise IntrafuseError(
            "the model cannot be traced by torch.export: "
            f"{type(error).__name__}: {text.splitlines()[0]}"
            + (f", in operator {operator}" if operator else ""),
            layer=failing_line(error),
            remedy=_remedy(model, error),
        ) from error
    if sys.stderr is not None:
        sys.stderr.write(printed.getvalue())
    _inline(program.graph_module)
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.name in lifted:
            node.meta[CONSTANT] = program.constants[lifted[node.name]]
    return program


def _inline(module: torch.fx.GraphModule) -> None:
    """Inline the operators of regions, such as those under `torch.autocast`, into the graph."""
    graph = module.graph
    for node in [n for n in graph.nodes if getattr(n.target, "__name__", "") in REGIONS]:
        inside = next(n for n in node.all_input_nodes if n.op == "get_attr")
        operands = node.args[node.args.index(inside) + 1 :]
        region = getattr(module, str(inside.target))
        _inline(region)
        entering = (n for n in region.graph.nodes if n.op == "placeholder")
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(
                region.graph, dict(zip(entering, operands, strict=True))
            )
        for user in [*node.users]:  # each user takes one result
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def caching(model: nn.Module) -> list[Any]:
    """List the configurations that make a model build a cache for its next call."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in configs.values() if getattr(c, "use_cache", None) is True]


@contextmanager
def plainly(model: nn.Module) -> Generator[None]:
    """Run a model without fused kernels and without a cache for its next call.

    A fused transformer layer is one operator that hides its parts. A cache of keys and values is an
    output type that `torch.export` does not know. A stack of transformer layers inspects its mask
    to find whether it is causal, unless an argument says so; the mask applies either way.
    """
    cached = caching(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for config in cached:
        config.use_cache = False
    hooks = [
        module.register_forward_pre_hook(partial(_tell, *STACKS[kind]), with_kwargs=True)
        for module in model.modules()
        for kind in STACKS
        if type(module).forward is kind.forward
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in cached:
            config.use_cache = True


def _tell(
    name: str, place: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Set an argument that is missing or None to False."""
    if len(args) > place:
        return (*args[:place], args[place] or False, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: kwargs.get(name) or False}


@contextmanager
def _without_warnings() -> Generator[None]:
    """Silence torch's log messages before an error that repeats them.

    Also silence warnings about modules that keep tensors in lists, such as recurrent layers.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _remedy(model: nn.Module, error: BaseException) -> str:
    """Return the remedy for a failed export."""
    if isinstance(model, torch.jit.ScriptModule):
        return "pass the module as it was before torch.jit made it a script"
    unknown = re.search(r"class '([\w.<>]+)'.*(known type|register_dataclass)", str(error))
    if unknown is not None:
        name = unknown[1].rpartition(".")[2]
        return f"call torch.export.register_dataclass({name}) once, or use a dictionary or a tuple"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(isinstance(v, PackedSequence) for frame in frames for v in frame.f_locals.values()):
        return (
            "a packed sequence cannot be traced: pass the padded sequence to the layer if "
            "torch.compiler.is_exporting(); channels flow the same way"
        )
    return (
        "check that model(*example_inputs) runs, replace control flow that depends on tensor "
        "values, or trace the part of the model that should be pruned"
    )


def _last_operator(error: BaseException) -> str | None:
    """Name the last operator that was recorded before an export failed, if the error shows it."""
    graph = getattr(error, "partial_fx_graph", None)
    names = re.findall(r"torch\.ops\.([\w.]+)\(", str(getattr(graph, "code", graph)))
    return names[-1] if names else None


def failing_line(error: BaseException) -> str | None:
    """Find the last executed line of the model's code, outside PyTorch and this package."""
    homes = Path(str(torch.__file__)).parent, Path(errors.__file__).parents[1]
    libraries = tuple(f"{home}{os.sep}" for home in homes)
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in frames if not name.startswith((*libraries, "<"))]
    if not own:
        return None
    name, line = own[-1]
    return f"{name}:{line}: {linecache.getline(name, line or 0).strip()}"


class _Done(Exception):
    """Raised after a model's forward, to stop the export once all operators are recorded."""


def record(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    cached: bool = False,
    each: Each | None = None,
) -> list[Node]:
    """List the operators that a model runs, at a third of the cost of an export.

    The list holds their names, arguments and shapes, but not their places in the code.

    Args:
        model: the network.
        example_inputs: its inputs.
        cached: let the model build a cache for its next call, if it does so by default.
        each: called after each operator with all operators so far; an exception stops the model.

    Raises:
        IntrafuseError: the model cannot be traced; its cause is the exception of model or `each`.
    """

    def begin(*_: object) -> None:
        record_lightly(each)

    def stop(*_: object) -> None:
        raise _Done

    hooks = [
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_hook(stop),
    ]
    try:
        return [*export_program(model, example_inputs, cached=cached).graph.nodes]
    except IntrafuseError as error:
        if not isinstance(error.__cause__, _Done):
            raise
        return recorded(error.__cause__)
    finally:
        for hook in hooks:
            hook.remove()


def recorded(error: BaseException) -> list[Node]:
    """List the operators that a failed export had recorded."""
    frame = error.__traceback__
    while frame is not None:
        tracer = frame.tb_frame.f_locals.get("tracer")
        graph = getattr(tracer, "graph", None)
        if isinstance(graph, Graph):
            for node in graph.nodes:
                if node.op == "get_attr" and CONSTANT not in node.meta:
                    node.meta[CONSTANT] = getattr(getattr(tracer, "root", None), node.target, None)
            return [*graph.nodes]
        frame = frame.tb_next
    return []
