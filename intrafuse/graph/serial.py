"""Channel graphs and trees as JSON data, so that a saved plan can be applied without a trace."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from intrafuse.graph.axes import Product, Sum, Tree, leaves, locate
from intrafuse.graph.groups import (
    Attribute,
    ChannelGraph,
    ChannelGroup,
    Cost,
    Hint,
    Layer,
    Norm,
    Rescale,
    Slot,
)

__all__ = ["graph_from_data", "graph_to_data"]


def _pack(tree: Tree) -> Any:
    if isinstance(tree, int):
        return tree
    return (
        {"+": [*map(_pack, tree.parts)]}
        if isinstance(tree, Sum)
        else {"*": [*map(_pack, tree.factors)]}
    )


def _unpack(data: Any) -> Tree:
    if isinstance(data, int):
        return data
    ((sign, children),) = data.items()
    trees = tuple(map(_unpack, children))
    return Sum(trees) if sign == "+" else Product(trees)


def graph_to_data(graph: ChannelGraph) -> dict[str, Any]:
    """Turn a channel graph into JSON data; the traced operators are left out."""

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


def graph_from_data(data: dict[str, Any]) -> ChannelGraph:
    """Rebuild a channel graph from what `graph_to_data` gave."""
    axes = {name: tuple(map(_unpack, trees)) for name, trees in data["axes"].items()}
    sizes = {int(atom): size for atom, size in data["sizes"].items()}

    def group(item: dict[str, Any]) -> ChannelGroup:
        slots = tuple(
            Slot(name, axis, role, kind, locate(axes[name][axis], item["id"], sizes))
            for name, axis, role, kind in item["slots"]
        )
        return ChannelGroup(
            item["id"],
            item["name"],
            item["index"],
            item["size"],
            slots,
            tuple(item["locked"]),
            tuple(item.get("chosen", ())),
        )

    return ChannelGraph(
        groups=tuple(map(group, data["groups"])),
        locked=tuple(map(group, data["locked"])),
        axes=axes,
        sizes=sizes,
        layers={item["weight"]: Layer(**item) for item in data["layers"]},
        norms=tuple(Norm(**item) for item in data["norms"]),
        attributes=tuple(Attribute(m, n, _unpack(tree)) for m, n, tree in data["attributes"]),
        costs=tuple(Cost(n, f, tuple(map(_unpack, trees))) for n, f, trees in data["costs"]),
        aliases=data["aliases"],
        hints=tuple(Hint(m, n, tuple(map(_unpack, ts))) for m, n, ts in data.get("hints", ())),
        rescales=tuple(
            Rescale(w, b, axis, _unpack(before), _unpack(part), _unpack(over), exponent, *offset)
            for w, b, axis, before, part, over, exponent, *offset in data.get("rescales", ())
        ),
    )
