"""`intrafuse inspect`: the channel groups of a network, prunable and locked, and its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from intrafuse.cli.options import Common, ModelOptions
from intrafuse.cli.output import show_table, write_json

if TYPE_CHECKING:
    from intrafuse.graph import ChannelGroup, Slot

__all__ = ["inspect"]


def inspect(model: ModelOptions, common: Common) -> None:
    """Show the channel groups of a network, what is locked and why, and its size."""
    common.start()
    from intrafuse.budget import measure
    from intrafuse.graph import trace
    from intrafuse.weights import Weights

    resolved = model.resolve(common.device)
    graph = trace(resolved.model, resolved.example_inputs)
    figures = measure(graph, graph.sizes, Weights.of(graph, resolved.model).counted())
    groups = sorted(graph.groups, key=lambda group: group.index)
    write_json(
        common,
        "inspection",
        {
            "model": model.model,
            **vars(figures),
            "groups": [{"index": g.index, **_data(g)} for g in groups],
            "locked": [{**_data(g), "reasons": list(g.locked)} for g in graph.locked],
        },
    )
    show_table(
        common,
        f"{model.model}: {figures.channels:,} channels in {len(groups)} groups, "
        f"{figures.params:,} parameters, {figures.macs:,} MACs",
        ["index", "group", "channels", "writers", "carriers", "readers"],
        [[str(g.index), g.name, str(g.size), *map(_layers, _roles(g))] for g in groups],
        numbers=(0, 2),
    )
    if graph.locked:
        rows = [[g.name, str(g.size), "; ".join(g.locked)] for g in graph.locked]
        show_table(common, "Locked", ["group", "channels", "why"], rows, numbers=(1,))


def _roles(group: ChannelGroup) -> tuple[tuple[Slot, ...], ...]:
    return group.writers, group.carriers, group.readers


def _layers(slots: tuple[Slot, ...]) -> str:
    return ", ".join(dict.fromkeys(slot.layer for slot in slots))


def _data(group: ChannelGroup) -> dict[str, Any]:
    found: dict[str, Any] = {"name": group.name, "channels": group.size}
    for role, slots in zip(("writers", "carriers", "readers"), _roles(group), strict=True):
        found[role] = [{"parameter": s.parameter, "axis": s.axis} for s in slots]
    return found
