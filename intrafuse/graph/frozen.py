"""Freeze the result of a trace into a channel graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch.fx import Node

from intrafuse.graph.axes import Product, Sum, Tree, layout, leaves
from intrafuse.graph.export import ExampleInputs
from intrafuse.graph.groups import (
    HELD,
    NORMED,
    Attribute,
    ChannelGraph,
    ChannelGroup,
    Cost,
    Norm,
    Slot,
)
from intrafuse.graph.program import Program
from intrafuse.graph.rules import Scope
from intrafuse.graph.rules.computed import COMPUTED, claim_functions
from intrafuse.graph.rules.normed import other_uses
from intrafuse.graph.rules.sums import ADDED

__all__ = ["free_atoms", "freeze", "hold", "lock_unclear"]


def free_atoms(scope: Scope) -> list[int]:
    """List the atoms of the prunable groups."""
    return [group.id for group in _name_groups(scope) if not group.locked]


def _slots(scope: Scope) -> dict[int, list[Slot]]:
    """List the places of each atom on parameters that have a role."""
    slots: dict[int, list[Slot]] = {}
    for (parameter, axis), (role, kind) in scope.roles.items():
        tree = scope.table.resolve(scope.parameter_axes[parameter][axis])
        for atom, blocks in layout(tree, scope.table.size).items():
            slots.setdefault(atom, []).append(Slot(parameter, axis, role, kind, tuple(blocks)))
    return slots


def hold(scope: Scope, include: Sequence[str]) -> None:
    """Lock groups that a norm reduces over unless `include` names them."""
    for group in _name_groups(scope) if scope.normed else ():
        named = any(fnmatchcase(group.name, pattern) for pattern in include)
        if group.normed and not group.locked and not named:
            scope.table.lock(group.id, f"{NORMED}{HELD}include={[group.name]}")


def freeze(scope: Scope, nodes: tuple[Node, ...], example_inputs: ExampleInputs) -> ChannelGraph:
    """Freeze the axes, roles and notes of a scope into a channel graph."""
    resolve = scope.table.resolve
    axes = {name: tuple(map(resolve, trees)) for name, trees in scope.parameter_axes.items()}
    groups = _name_groups(scope)
    free = [group for group in groups if not group.locked]
    free = [replace(group, index=len(free) - 1 - i) for i, group in enumerate(free)]
    attributes = (Attribute(a.module, a.name, resolve(a.tree)) for a in scope.attributes)
    scales = {node: (resolve(tree), power) for node, (tree, power) in scope.scales.items()}
    starts = {node: resolve(tree) for node, tree in scope.starts.items()}
    return ChannelGraph(
        groups=tuple(free),
        locked=tuple(group for group in groups if group.locked),
        axes=axes,
        sizes=dict(enumerate(scope.table.size)),
        layers=scope.layers,
        norms=_list_norms(scope),
        attributes=tuple(dict.fromkeys(attributes)),
        costs=tuple(Cost(c.layer, c.factor, tuple(map(resolve, c.trees))) for c in scope.costs),
        aliases=scope.aliases,
        rescales=tuple(
            replace(r, before=resolve(r.before), part=resolve(r.part), over=resolve(r.over))
            for r in scope.rescales
        ),
        hints=tuple(replace(h, trees=tuple(map(resolve, h.trees))) for h in scope.hints),
        traced=Program(nodes, scope.resolved(), scope.parameters, scales, starts, example_inputs),
    )


def _list_norms(scope: Scope) -> tuple[Norm, ...]:
    """List each norm once. A norm that runs twice or shares a parameter folds into no layer."""
    uses = Counter(name for norm in scope.norms for name in norm.tensors)
    alone = [max(uses[name] for name in norm.tensors) == 1 for norm in scope.norms]
    norms = (
        norm if once else replace(norm, layer=None)
        for norm, once in zip(scope.norms, alone, strict=True)
    )
    return tuple(dict.fromkeys(norms))


def lock_unclear(scope: Scope) -> None:
    """Lock axes that no rule accounts for: parameters without a role, and squared channels."""
    claim_functions(scope)
    known = {name for name, _ in scope.roles}
    for name, axis in sorted(scope.tied):
        tree = scope.table.resolve(scope.parameter_axes[name][axis])
        if not all(NORMED in scope.table.choices(atom) for atom in leaves(tree)):
            for tree in scope.parameter_axes[name]:  # no merge map fits both roles
                scope.table.lock(tree, f"{name} is used as writer and as reader")
    for name in other_uses(scope):
        scope.table.lock(scope.parameter_axes[name][0], f"{name} is used by more than a norm")
    for name, trees in scope.parameter_axes.items():
        for axis, tree in enumerate(map(scope.table.resolve, trees)):
            if (name, axis) not in scope.roles:
                scope.table.lock(tree, f"{name} meets it in a way that no rule describes")
                if name in scope.trained - known:  # so that the locked groups show it
                    scope.use(name, axis, "carrier", "scale")
            for atom in _squared(tree):
                scope.table.lock(atom, "it is multiplied with itself along one axis")
            for atom in leaves(tree):
                if {COMPUTED, ADDED} <= {*scope.table.choices(atom)}:
                    scope.table.lock(atom, f"{COMPUTED}, and {ADDED}")


def _squared(tree: Tree) -> list[int]:
    """List atoms that occur in two factors of one product."""
    if isinstance(tree, int):
        return []
    children = tree.parts if isinstance(tree, Sum) else tree.factors
    squared = [atom for child in children for atom in _squared(child)]
    if isinstance(tree, Product):
        counts = Counter(atom for child in children for atom in set(leaves(child)))
        squared += [atom for atom, count in counts.items() if count > 1]
    return squared


def _kinds(scope: Scope) -> dict[int, str]:
    """Map atoms of attention to their kind: "heads", or "width" of a head."""
    kinds: dict[int, str] = {}
    for _, what, tree in scope.heads:
        kind = {"heads": "heads", "width": "width", "value width": "width"}.get(what)
        for atom in leaves(scope.table.resolve(tree)) if kind else ():
            kinds.setdefault(atom, str(kind))
    return kinds


def _name_groups(scope: Scope) -> list[ChannelGroup]:
    groups: list[ChannelGroup] = []
    taken: Counter[str] = Counter()
    kinds = _kinds(scope)
    summed = {a for tree in scope.contracted.values() for a in leaves(scope.table.resolve(tree))}
    for atom, rows in _slots(scope).items():
        writers = [slot for slot in rows if slot.role == "writer"]
        reasons = list(scope.table.reasons(atom))
        size = scope.table.size[atom]
        if size < 2:
            reasons.append("a single channel")
        if not writers:
            if not reasons:
                reasons.append("no layer writes these channels")
            if all(slot.role == "reader" for slot in rows):
                continue  # the model's own inputs
        elif all(slot.role != "reader" for slot in rows) and not reasons and atom not in summed:
            reasons.append("no layer reads these channels")
        name = (writers or rows)[0].layer
        choices = scope.table.choices(atom)
        kind = kinds.get(atom, "normed" if NORMED in choices else "")
        open_ = all(HELD in reason for reason in reasons)  # or `include` can unlock it
        name += f"#{kind}" if kind and (atom in kinds or open_) else ""
        taken[name] += 1
        name += f"#{taken[name]}" if taken[name] > 1 else ""
        groups.append(ChannelGroup(atom, name, -1, size, tuple(rows), tuple(reasons), choices))
    return groups
