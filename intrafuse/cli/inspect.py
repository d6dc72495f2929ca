"""`intrafuse inspect`: show size, prunable groups and locked groups of a network."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intrafuse.cli.options import Common, ModelOptions
from intrafuse.cli.output import show_note, show_table, write_json

if TYPE_CHECKING:
    from intrafuse.catalog.zoo import ResolvedModel
    from intrafuse.graph import ChannelGroup, Slot

__all__ = ["inspect"]

VERIFIED = 0.5  # share of channels that --verify removes from every group
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Remove half of every group's channels, and compare with a masked copy.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Unlock groups of norms with these names; verify only these groups; repeatable.",
    ),
]


def inspect(
    model: ModelOptions, common: Common, include: Include = None, verify: Verify = False
) -> None:
    """Show the size of a network, its prunable groups, and its locked groups with reasons."""
    common.start()
    from intrafuse.allocation.budget import measure
    from intrafuse.allocation.patterns import require_matches
    from intrafuse.graph import trace
    from intrafuse.surgery.weights import Weights

    resolved = model.resolve(common.device)
    graph = trace(resolved.model, resolved.example_inputs, include=include or ())
    require_matches(include or (), graph, "include")
    figures = measure(graph, graph.sizes, Weights.of(graph, resolved.model).counted())
    groups = sorted(graph.groups, key=lambda group: group.index)
    data = {
        "model": model.model,
        **vars(figures),
        "groups": [{"index": g.index, **_data(g)} for g in groups],
        "locked": [{**_data(g), "reasons": list(g.locked)} for g in graph.locked],
    }
    if verify and groups:
        data["verified"] = _verify(resolved, include, common)
    elif verify:
        show_note("note: no group can be pruned, so there is nothing to verify")
    write_json(common, "inspection", data)
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
    if "verified" in data:
        rows = [[name, f"{value:g}"] for name, value in data["verified"].items()]
        show_table(common, "Verified against a masked copy", ["", ""], rows, numbers=(1,))


def _verify(resolved: ResolvedModel, include: list[str] | None, common: Common) -> dict[str, Any]:
    """Prune a network with `select`, and compare it with a masked copy of the original."""
    from intrafuse.pruning.prune import plan
    from intrafuse.pruning.verification import verify

    inputs = resolved.example_inputs
    made = plan(
        resolved.model,
        inputs,
        channels=VERIFIED,
        method="select",
        importance="random",
        include=include or None,
        seed=common.seed or 0,
    )
    agreement = verify(resolved.model, made)
    return {"channels_removed": made.removed["channels"], **asdict(agreement)}


def _roles(group: ChannelGroup) -> tuple[tuple[Slot, ...], ...]:
    return group.writers, group.carriers, group.readers


def _layers(slots: tuple[Slot, ...]) -> str:
    return ", ".join(dict.fromkeys(slot.layer for slot in slots))


def _data(group: ChannelGroup) -> dict[str, Any]:
    data: dict[str, Any] = {"name": group.name, "channels": group.size}
    for role, slots in zip(("writers", "carriers", "readers"), _roles(group), strict=True):
        data[role] = [{"parameter": s.parameter, "axis": s.axis} for s in slots]
    return data
