"""The plan: the merge maps of all groups. A plan can be inspected, saved and applied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafuse.allocation.budget import KINDS, Figures
from intrafuse.graph.export import ExampleInputs
from intrafuse.graph.groups import ChannelGraph
from intrafuse.graph.serial import GraphData, graph_from_data, graph_to_data
from intrafuse.pruning.solved import Solved
from intrafuse.pruning.verification.proof import check as prove
from intrafuse.support.arguments import check_arguments
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing
from intrafuse.support.modules import held_size
from intrafuse.support.reading import parse_json, require_file
from intrafuse.support.tables import text_table
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.install import install
from intrafuse.surgery.merge_map import MergeMap
from intrafuse.surgery.weights import Weights

__all__ = ["MergeMap", "Plan", "as_data"]

FORMAT = 2
BEFORE_SOLVED = 1  # plans without solved layers are written so that earlier versions read them
SOLVED = "solved"  # prefix of solved tensors in a file
MATRICES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEPT = (torch.int64, torch.int32)
# Errors raised if parts of an edited plan contradict each other or the model.
CONTRADICTIONS = (
    *(LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    StopIteration,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The planned change of each channel group; making a plan changes nothing.

    Attributes:
        graph: the channel graph of the model.
        maps: one merge map for each group that shrinks, in the order of application.
        fold: whether batch norm is folded first.
        settings: method, importance, budget and seed, as JSON data.
        before, after: channels, parameters and MACs of the network.
        seconds: planning time.
        solved: layers that the method solved on data after all maps.
    """

    graph: ChannelGraph
    maps: tuple[MergeMap, ...]
    fold: bool
    settings: Mapping[str, Any]
    before: Figures
    after: Figures
    seconds: float = 0.0
    solved: Solved = field(default_factory=Solved)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels that each prunable group keeps, by group name."""
        merged = {merge_map.group: merge_map.width for merge_map in self.maps}
        return {group.name: merged.get(group.name, group.size) for group in self.graph.groups}

    @property
    def notes(self) -> dict[str, Mapping[str, Any]]:
        """Notes of the method on its choices, by group name; most methods leave none."""
        return {merge_map.group: merge_map.note for merge_map in self.maps if merge_map.note}

    @property
    def removed(self) -> dict[str, float]:
        """Removed share of channels, params and macs, in [0, 1]."""
        return self.after.removed(self.before)

    def with_maps(self, maps: Sequence[MergeMap], *, fold: bool | None = None) -> Plan:
        """Return the plan with other maps, and without solved layers, which fit only its own."""
        fold = self.fold if fold is None else fold
        return replace(self, maps=tuple(maps), fold=fold, solved=Solved())

    @apart
    def weights(self, model: nn.Module) -> Weights:
        """Compute the tensors of the pruned network; the model does not change.

        Raises:
            IntrafuseError: the model's shapes differ from the planned ones, or a weight is not
                finite.
        """
        check_arguments(model=model)
        try:
            weights = Weights.of(self.graph, model)
            if self.fold:
                fold_norms(weights)
            for merge_map in self.maps:
                weights.merge(merge_map.check())
            self.solved.put(weights)
            self._require_places(model, weights)
        except IntrafuseError:
            raise
        except CONTRADICTIONS as error:
            if self.graph.traced is not None:  # planned in this process, not loaded from a file
                raise
            raise IntrafuseError(
                f"the plan contradicts itself or the model ({type(error).__name__}: {error})",
                remedy="make the plan again from this model",
            ) from error
        return weights

    def _require_places(self, model: nn.Module, weights: Weights) -> None:
        """Refuse tensors and attributes that the model cannot hold, before changing it."""
        owners = dict(model.named_modules(remove_duplicate=False))
        for name in (*weights.state, *self.graph.aliases):
            path, _, leaf = name.rpartition(".")
            if path not in owners or not hasattr(owners[path], leaf):
                raise IntrafuseError("the module has no such parameter", layer=name)
        for item in (*self.graph.attributes, *self.graph.hints):
            if item.module not in owners or held_size(owners[item.module], item.name) is None:
                raise IntrafuseError(f"the layer has no {item.name}", layer=item.module)

    @apart
    def apply(
        self,
        model: nn.Module,
        *,
        example_inputs: ExampleInputs | None = None,
        inplace: bool = False,
        check: bool = True,
    ) -> nn.Module:
        """Return the pruned network.

        Args:
            model: the network that the plan was made for, or one of the same shapes.
            example_inputs: inputs to check the result with, as `prune` does.
            inplace: change and return `model` itself instead of a copy.
            check: whether to check the result if example inputs are given.

        Raises:
            IntrafuseError: the model's shapes differ from the planned ones, a weight is not
                finite, or the check finds the result wrong.
        """
        check_arguments(inplace=inplace, check=check)
        weights = self.weights(model)
        if check and example_inputs is not None:
            pruned = install(model, weights)
            prove(model, pruned, self, example_inputs)
            if not inplace:
                return pruned
        return install(model, weights, inplace=inplace)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Predict the shape of every parameter and buffer that the graph knows."""
        sizes = self.graph.resized(self.widths)
        return {name: self.graph.shape(name, sizes) for name in self.graph.axes}

    def __str__(self) -> str:
        rows = [
            [
                str(g.index),
                g.name,
                str(g.size),
                str(self.widths[g.name]),
                ", ".join(g.layers[:3]) + (", ..." if len(g.layers) > 3 else ""),
                ", ".join(dict.fromkeys(s.layer for s in g.readers[:3])),
            ]
            for g in sorted(self.graph.groups, key=lambda group: group.index)
        ]
        header = ["index", "group", "channels", "kept", "written by", "read by"]
        if self.notes:
            header.append("chosen")
            for row in rows:
                row.append(str(self.notes.get(row[1], {}).get("chosen", "")))
        summary = "   ".join(
            f"{kind} {getattr(self.before, kind):,} -> {getattr(self.after, kind):,} "
            f"({self.removed[kind]:.1%} removed)"
            for kind in KINDS
        )
        title = f"Plan: {self.settings.get('method', {}).get('name', '?')}"
        return f"{text_table(title, header, rows, numbers=(0, 2, 3))}{summary}"

    def as_data(self) -> dict[str, Any]:
        """Return settings, sizes and widths as JSON data."""
        return as_data(self)

    def save(self, path: str | Path) -> None:
        """Write the plan to one safetensors file; a failure leaves no partial file."""
        tensors = {
            f"{i}/{name}": tensor.contiguous().clone()
            for i, merge_map in enumerate(self.maps)
            for name, tensor in merge_map.tensors().items()
        }
        tensors |= {f"{SOLVED}/{name}": t.contiguous() for name, t in self.solved.tensors.items()}
        data = {
            "format": FORMAT if self.solved.tensors else BEFORE_SOLVED,
            "groups": [merge_map.group for merge_map in self.maps],
            "fold": self.fold,
            "notes": [dict(merge_map.note) for merge_map in self.maps],
            "settings": dict(self.settings),
            "before": vars(self.before),
            "after": vars(self.after),
            "seconds": self.seconds,
            "graph": graph_to_data(self.graph),
            **({"marks": dict(self.solved.marks)} if self.solved.tensors else {}),
        }
        with replacing(Path(path)) as temporary:
            save_file(
                tensors or {"empty": torch.zeros(0)},
                temporary,
                {"plan": json.dumps(data, default=repr)},
            )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file that `save` wrote.

        Raises:
            IntrafuseError: the file is missing, truncated or not a plan.
        """
        try:
            require_file(path)
            with safe_open(str(path), "pt") as file:
                text = (file.metadata() or {})["plan"]
                # copies are aligned like new tensors, so products round the same way
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            version = parse_json(text, infinite=True)["format"]
            if version not in (BEFORE_SOLVED, FORMAT):
                raise IntrafuseError("the plan has an unknown format", value=version)
            return cls._from_data(_PlanData.model_validate_json(text), tensors)
        except IntrafuseError:
            raise
        except (OSError, SafetensorError, *CONTRADICTIONS) as error:
            told = " ".join(str(error).split())
            raise IntrafuseError(
                "a plan must be a readable safetensors file that intrafuse wrote: "
                f"{type(error).__name__}: {told}",
                value=str(path),
                remedy="make the plan again",
            ) from error

    @classmethod
    def _from_data(cls, data: _PlanData, tensors: Mapping[str, Tensor]) -> Plan:
        if not isinstance(data.settings.get("method", {}), dict):
            raise ValueError("the settings of the method must be a mapping")
        graph = graph_from_data(data.graph)
        graph.attribute_values(graph.sizes)
        for name in graph.axes:
            graph.shape(name, graph.sizes)
        maps = []
        for i, (name, note) in enumerate(zip(data.groups, data.noted, strict=True)):
            own = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{i}/")}
            for part, tensor in own.items():
                if tensor.dtype not in (KEPT if part == "keep" else MATRICES):
                    raise ValueError(f"{part} of {name} has the unsupported dtype {tensor.dtype}")
            merge_map = replace(MergeMap.from_tensors(name, own).check(), note=note)
            if merge_map.size != graph.by_name[name].size:
                raise IntrafuseError("a merge map and its group differ in size", layer=name)
            maps.append(merge_map)
        if len({merge_map.group for merge_map in maps}) < len(maps):
            raise ValueError("the plan has two merge maps for one group")
        own = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{SOLVED}/")}
        if {n for n in own if n in graph.layers} != data.marks.keys():
            raise ValueError("each solved layer needs a mark of the weight that it replaces")
        plan = cls(
            graph, tuple(maps), data.fold, data.settings, data.before, data.after, data.seconds,
            Solved(own, data.marks),
        )  # fmt: skip
        macs = graph.macs(graph.sizes), graph.macs(graph.resized(plan.widths))
        counted = [
            count for figures in (plan.before, plan.after) for count in vars(figures).values()
        ]
        if macs != (plan.before.macs, plan.after.macs) or min(counted) < 0:
            raise ValueError("the channel graph contradicts the sizes of the plan")
        return plan


def as_data(planned: Any) -> dict[str, Any]:
    """Return settings, sizes and widths of a plan, or of what streaming made, as JSON data."""
    names = ("method", "importance", "budget", "seed")
    widths = {
        group.name: {
            "index": group.index,
            "before": group.size,
            "after": planned.widths[group.name],
            "written_by": list(group.layers),
            "read_by": list(dict.fromkeys(slot.layer for slot in group.readers)),
        }
        for group in planned.graph.groups
    }
    return {
        **{name: planned.settings.get(name) for name in names},
        "before": vars(planned.before),
        "after": vars(planned.after),
        "removed": dict(planned.removed),
        "widths": widths,
        "notes": {group: dict(note) for group, note in planned.notes.items()},
        "seconds": planned.seconds,
    }


class _PlanData(BaseModel):
    """The JSON data in the file of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: int
    groups: tuple[str, ...]
    fold: bool
    notes: tuple[dict[str, JsonValue], ...] | None = None
    settings: dict[str, JsonValue]
    before: Figures
    after: Figures
    seconds: float
    graph: GraphData
    marks: dict[str, float] = Field(default_factory=dict[str, float])

    @property
    def noted(self) -> tuple[dict[str, JsonValue], ...]:
        """The method's note on each group; empty in files of early versions."""
        return ({},) * len(self.groups) if self.notes is None else self.notes
