"""Channel graphs and trees as JSON data: a saved plan can be applied without a new trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from intrafuse.graph.axes import Product, Sum, Tree, leaves, locate
from intrafuse.graph.groups import (
    Attribute,
    ChannelGraph,
    ChannelGroup,
    Cost,
    Hint,
    Kind,
    Layer,
    Norm,
    Rescale,
    Role,
    Slot,
)

__all__ = ["GraphData", "graph_from_data", "graph_to_data"]

Count = Annotated[int, Field(ge=0, lt=2**63)]
_Scaled = tuple[str, str | None, Count, JsonValue, JsonValue, JsonValue, float]
_Shifted = tuple[str, str | None, Count, JsonValue, JsonValue, JsonValue, float, float]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Group(_Data):
    """A channel group without its blocks, which are computed from the trees."""

    id: Count
    name: str
    index: int
    size: Count
    slots: tuple[tuple[str, Count, Role, Kind], ...]
    locked: tuple[str, ...]
    chosen: tuple[str, ...] = ()


class GraphData(_Data):
    """A channel graph in a file. Trees are numbers, {"+": [...]} or {"*": [...]}."""

    groups: tuple[_Group, ...]
    locked: tuple[_Group, ...]
    axes: dict[str, tuple[JsonValue, ...]]
    sizes: dict[int, Count]
    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]
    attributes: tuple[tuple[str, str, JsonValue], ...]
    costs: tuple[tuple[str, float, tuple[JsonValue, ...]], ...]
    aliases: dict[str, str]
    hints: tuple[tuple[str, str, tuple[JsonValue, ...]], ...] = ()
    rescales: tuple[_Scaled | _Shifted, ...] = ()


def _pack(tree: Tree) -> Any:
    if isinstance(tree, int):
        return tree
    return (
        {"+": [*map(_pack, tree.parts)]}
        if isinstance(tree, Sum)
        else {"*": [*map(_pack, tree.factors)]}
    )


def _unpack(data: Any, sizes: Mapping[int, int]) -> Tree:
    if type(data) is int:
        if data not in sizes:
            raise ValueError(f"a tree holds the atom {data}, whose size is unknown")
        return data
    children: JsonValue
    ((sign, children),) = data.items()
    if sign not in ("+", "*") or not isinstance(children, list):
        raise ValueError(f"{sign!r} is not a node of a tree")
    trees = tuple(_unpack(child, sizes) for child in children)
    return Sum(trees) if sign == "+" else Product(trees)


def graph_to_data(graph: ChannelGraph) -> dict[str, Any]:
    """Turn a channel graph into JSON data, without the traced operators."""

    def group(item: ChannelGroup) -> dict[str, Any]:
        slots = [[s.parameter, s.axis, s.role, s.kind] for s in item.slots]
        return {
            "id": item.id,
            "name": item.name,
            "index": item.index,
            "size": item.size,
            "slots": slots,
            "locked": list(item.locked),
            "chosen": list(item.chosen),
        }

    trees = [tree for axes in graph.axes.values() for tree in axes]
    trees += [item.tree for item in graph.attributes]
    trees += [tree for hint in graph.hints for tree in hint.trees]
    trees += [tree for cost in graph.costs for tree in cost.trees]
    trees += [tree for r in graph.rescales for tree in (r.before, r.part, r.over)]
    used = sorted({atom for tree in trees for atom in leaves(tree)})
    return {
        "groups": [group(g) for g in graph.groups],
        "locked": [group(g) for g in graph.locked],
        "axes": {name: [*map(_pack, axes)] for name, axes in graph.axes.items()},
        "sizes": {str(atom): graph.sizes[atom] for atom in used},
        "layers": [asdict(layer) for layer in graph.layers.values()],
        "norms": [asdict(norm) for norm in graph.norms],
        "attributes": [[a.module, a.name, _pack(a.tree)] for a in graph.attributes],
        "hints": [[h.module, h.name, [*map(_pack, h.trees)]] for h in graph.hints],
        "costs": [[c.layer, c.factor, [*map(_pack, c.trees)]] for c in graph.costs],
        "aliases": dict(graph.aliases),
        "rescales": [
            [r.weight, r.bias, r.axis, *map(_pack, trees), r.exponent, r.offset]
            for r in graph.rescales
            for trees in [(r.before, r.part, r.over)]
        ],
    }


def graph_from_data(data: GraphData) -> ChannelGraph:
    """Rebuild a channel graph from the data of `graph_to_data`.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: the data are inconsistent.
    """
    sizes = data.sizes

    def tree(packed: Any) -> Tree:
        return _unpack(packed, sizes)

    axes = {name: tuple(map(tree, trees)) for name, trees in data.axes.items()}

    def group(item: _Group) -> ChannelGroup:
        if sizes.get(item.id, item.size) != item.size:
            raise ValueError(f"the group {item.name!r} has two sizes")
        slots = tuple(
            Slot(name, axis, role, kind, locate(axes[name][axis], item.id, sizes))
            for name, axis, role, kind in item.slots
        )
        return ChannelGroup(
            item.id, item.name, item.index, item.size, slots, item.locked, item.chosen
        )

    graph = ChannelGraph(
        groups=tuple(map(group, data.groups)),
        locked=tuple(map(group, data.locked)),
        axes=axes,
        sizes=sizes,
        layers={layer.weight: layer for layer in data.layers},
        norms=data.norms,
        attributes=tuple(Attribute(m, n, tree(packed)) for m, n, packed in data.attributes),
        costs=tuple(Cost(n, f, tuple(map(tree, packed))) for n, f, packed in data.costs),
        aliases=data.aliases,
        hints=tuple(Hint(m, n, tuple(map(tree, packed))) for m, n, packed in data.hints),
        rescales=tuple(
            Rescale(w, b, axis, tree(before), tree(part), tree(over), *numbers)
            for w, b, axis, before, part, over, *numbers in data.rescales
        ),
    )
    if len(graph.by_name) < len(graph.groups):
        raise ValueError("two groups have the same name")
    return graph
