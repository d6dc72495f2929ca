"""Find out by trial which sizes in a model's code follow when channels go.

Code is full of sizes: `x.view(b, t, self.heads, -1)`, `x[..., : x.shape[-1] // 2]`, a literal 64.
A trace shows numbers only. So a copy of the model is given other sizes in every group that may be
pruned, without any values, and is traced again: a number that changed as the graph expects was
computed from shapes. One that did not may come from an attribute of the module; then the attribute
is changed as well, and the trial repeated. What does not follow in the end is locked. So is
attention whose scale follows the width in a way that no layer before it can make up for.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from intrafuse.errors import IntrafuseError
from intrafuse.graph.axes import Tree, leaves, tree_size
from intrafuse.graph.compare import Difference, calls, first_difference, numbers
from intrafuse.graph.groups import Attribute
from intrafuse.graph.rules import Literal, Scope, operator_name
from intrafuse.graph.rules.scale import follow_size

__all__ = ["settle"]

Export = Callable[[nn.Module], Any]
Build = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Mapping[str, int]]], nn.Module]
ROUNDS = 24  # of trials; what is open after them is locked
# Attributes that say how large an axis of attention is, whether or not the code reads them.
NAMES = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
    "key heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "width": ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head"),
    "all": ("all_head_size", "inner_dim"),
}


class _Elsewhere(Exception):
    """Raised where a model fails at another size, but not in an operator of the trace.

    Attributes:
        lines: (file, line) of each call, innermost last.
    """

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        super().__init__(lines)
        self.lines = lines


@dataclass
class _Trials:
    """What the trials have found so far.

    Attributes:
        scope, nodes: the trace.
        attributes: (module, attribute) -> the tree that it follows.
        tried: attributes by the place in the code that they were tried for.
        added: what the last of them added to `attributes`.
    """

    scope: Scope
    nodes: list[Node]
    attributes: dict[tuple[str, str], Tree] = field(default_factory=dict)
    tried: dict[tuple, list[str]] = field(default_factory=dict)
    added: dict[tuple, list[tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def places(self) -> dict[Node, tuple]:
        """Where in the code each operator stands: the same for the same layer of another block."""
        count: Counter[tuple] = Counter()
        found = {}
        for node in self.nodes:
            place = (_line(node) or node.name, operator_name(node))
            module = (*_modules(node)[:1], *place)
            found[node] = (*place, count[module])
            count[module] += 1
        return found

    def at_stake(self, atoms: list[int]) -> list[Literal]:
        """List the numbers that may belong to atoms."""
        wanted, resolve = set(atoms), self.scope.table.resolve
        items = self.scope.literals
        return [i for i in items if not wanted.isdisjoint(leaves(resolve(i.axis)))]


def settle(
    scope: Scope, nodes: list[Node], free: Callable[[], list[int]], build: Build, export: Export
) -> None:
    """Lock the sizes that the code does not follow, and note the attributes that it needs.

    Args:
        scope: the trace; its literals are what is open.
        nodes: its operators.
        free: lists the atoms that may be pruned now.
        build: makes a copy of the model with parameters of other shapes, and other attributes.
        export: traces a model, and gives its nodes.
    """
    trials = _Trials(scope, nodes)
    _conventional(trials)
    if not _open(scope, free()):
        return
    works = partial(_works, trials, build=build, export=export)
    for left in range(ROUNDS, 0, -1):
        atoms = free()
        try:
            found = _trial(trials, atoms, build, export) if atoms else None
            if found is None:
                break
            learnt = _learn(trials, found, atoms)
        except _Elsewhere as failure:
            learnt = _give_up(trials, failure.lines, atoms)
        if not learnt:
            _lock_culprits(trials, atoms, works, left)
    else:
        for atom in free():
            scope.table.lock(atom, "no trial of the code at other sizes succeeded")
    for (module, name), tree in trials.attributes.items():
        scope.attributes.append(Attribute(module, name, tree))


def _works(trials: _Trials, atoms: list[int], build: Build, export: Export) -> bool:
    try:
        return not atoms or _trial(trials, atoms, build, export) is None
    except _Elsewhere:
        return False


def _lock_culprits(
    trials: _Trials, atoms: list[int], works: Callable[[list[int]], bool], budget: int
) -> None:
    """Find by halving which sizes the code does not bear, and lock these."""
    waiting = [atoms]
    while waiting:
        some = waiting.pop()
        budget -= 1
        if budget > 0 and works(some):
            continue
        if len(some) == 1 or budget <= 0:
            for atom in some:
                trials.scope.table.lock(atom, "the code fails where its size is another")
            continue
        waiting += [some[: len(some) // 2], some[len(some) // 2 :]]


def _open(scope: Scope, atoms: list[int]) -> bool:
    """Tell whether some number in the code may belong to the atoms that may be pruned."""
    wanted = set(atoms)
    trees = [item.axis for item in scope.literals] + [tree for _, _, tree in scope.heads]
    return any(not wanted.isdisjoint(leaves(scope.table.resolve(tree))) for tree in trees)


def _conventional(trials: _Trials) -> None:
    """Let attributes with usual names follow heads and widths of attention."""
    scope = trials.scope
    for node, what, tree in scope.heads:
        size = scope.table.measure(tree)
        for path in _modules(node)[:1]:
            owner = scope.model.get_submodule(path)
            for name in NAMES.get(what, ()):
                value = vars(owner).get(name)
                if type(value) is int and value == size and size > 1:
                    trials.attributes.setdefault((path, name), tree)


def _sizes(scope: Scope, atoms: list[int]) -> dict[int, int]:
    """Choose a new size for every atom: none is the old one, and neighbours differ."""
    sizes = dict(enumerate(scope.table.size))
    for i, atom in enumerate(atoms):
        n = sizes[atom]
        sizes[atom] = n + 1 + i % 7 if n < 64 else n - 1 - i % 31
    return sizes


def _trial(trials: _Trials, atoms: list[int], build: Build, export: Export) -> Difference | None:
    """Run the model at other sizes.

    Returns:
        None where it does what the graph expects, else the first difference. An operator that
        fails is one.
    """
    scope = trials.scope
    sizes, resolve = _sizes(scope, atoms), scope.table.resolve
    shapes = {
        name: tuple(tree_size(resolve(tree), sizes) for tree in trees)
        for name, trees in scope.parameter_axes.items()
    }
    attributes: dict[str, dict[str, int]] = {}
    known = [((a.module, a.name), a.tree) for a in scope.attributes]
    for (module, name), tree in [*known, *trials.attributes.items()]:
        attributes.setdefault(module, {})[name] = tree_size(resolve(tree), sizes)
    values = {
        node: [[*map(resolve, v)] if isinstance(v, list) else resolve(v) for v in value]
        for node, value in scope.values.items()
    }
    scales = {node: (resolve(tree), power) for node, (tree, power) in scope.scales.items()}
    expected = (values, scales, dict(enumerate(scope.table.size)), sizes)
    try:
        new = export(build(shapes, attributes))
    except IntrafuseError as error:
        cause = error.__cause__ or error
        recorded = _recorded(cause)
        found = first_difference(trials.nodes, recorded, *expected, whole=False)
        lines = [(f.filename, str(f.lineno)) for f in traceback.extract_tb(cause.__traceback__)]
        done = len(calls(recorded))
        if done and "val" not in calls(recorded)[-1].meta:
            done -= 1  # the one that failed
        following = calls(trials.nodes)[done:]
        if found is None and not (following and _line(following[0]) in lines):
            raise _Elsewhere(lines) from error
        return found or Difference(following[0], "runs", "an error")
    return first_difference(trials.nodes, new, *expected)


def _recorded(error: BaseException) -> list[Node]:
    """List the operators that an export had recorded when it failed."""
    step = error.__traceback__
    while step is not None:
        graph = getattr(step.tb_frame.f_locals.get("tracer"), "graph", None)
        if isinstance(graph, Graph):
            return [*graph.nodes]
        step = step.tb_next
    return []


def _learn(trials: _Trials, found: Difference, atoms: list[int]) -> bool:
    """Draw the conclusion from a trial: another attribute, a scale that follows, or a lock.

    Returns:
        Whether there was one.
    """
    place = trials.places[found.node]
    here = [item for item in trials.at_stake(atoms) if trials.places[item.node] == place]
    if here:
        _explain(trials, found, here)
        return True
    if _scales(trials, found, atoms):
        return True
    if found.expected is None and found.numbers is None:  # it fails, and perhaps not itself
        return False
    around = [node for node in trials.nodes if trials.places[node] == place]
    return any([_lock_around(trials.scope, node, set(atoms)) for node in around])


def _give_up(trials: _Trials, lines: list[tuple[str, str]], atoms: list[int]) -> bool:
    """Lock the numbers in the code that failed outside any operator; tell whether there are any."""
    at_stake = trials.at_stake(atoms)
    files = {file for file, _ in lines}
    near = [item for item in at_stake if (_line(item.node) or ("", ""))[0] in files]
    for item in near or at_stake:
        _lock(trials.scope, item)
    return bool(at_stake)


def _lock(scope: Scope, item: Literal) -> None:
    where = scope.where(item.node)
    scope.table.lock(item.axis, f"{operator_name(item.node)} takes its size as a number{where}")


def _lock_around(scope: Scope, node: Node, wanted: set[int]) -> bool:
    """Lock what enters and leaves an operator; tell whether something of that was wanted."""
    where = scope.where(node)
    reason = f"operator {operator_name(node)}{where} works with the size that was traced"
    trees = [tree for n in (node, *node.all_input_nodes) for tree in _flat(scope.values.get(n, []))]
    trees += [scope.contracted[n] for n in node.all_input_nodes if n in scope.contracted]
    found = [t for t in trees if not wanted.isdisjoint(leaves(scope.table.resolve(t)))]
    for tree in found:
        scope.table.lock(tree, reason)
    return bool(found)


def _flat(values: list) -> Iterator[Tree]:
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _explain(trials: _Trials, found: Difference, here: list[Literal]) -> None:
    """Try the next attribute that may be where a number comes from; without one, lock.

    Only numbers that were wrong are tried for, one after the other; `here` holds those of every
    layer where the same code runs.
    """
    wrong = _wrong(found)
    for at in dict.fromkeys(item.at for item in here):
        if wrong is None or at in wrong:
            items = [item for item in here if item.at == at]
            if _try_next(trials, (trials.places[found.node], at), items):
                return
    guilty = [item for item in here if wrong is None or item.at in wrong]
    # A number that is what it was when traced is one of the code's; others may follow from it.
    same = [i for i in guilty if wrong and wrong[i.at] == trials.scope.table.measure(i.part)]
    for item in same or guilty:
        _lock(trials.scope, item)


def _wrong(found: Difference) -> dict[tuple[int, ...], int] | None:
    """Map where a result differs in size to the size that it has; None where it is not known."""
    if found.expected is None or not isinstance(found.value, list):
        return None
    expected, given = dict(_indexed(found.expected)), dict(_indexed(found.value))
    return {at: given.get(at, -1) for at, size in expected.items() if given.get(at) != size}


def _indexed(shape: list, *before: int) -> Iterator[tuple[tuple[int, ...], int]]:
    for i, n in enumerate(shape):
        if isinstance(n, list):
            yield from _indexed(n, *before, i)
        else:
            yield (*before, i), n


def _try_next(trials: _Trials, place: tuple, items: list[Literal]) -> bool:
    """Let another attribute follow the axis that a number belongs to; tell whether there is one."""
    tried = trials.tried.setdefault(place, [])
    options = [_candidates(trials, item) for item in items]
    name = next((n for n in options[0] if n not in tried and all(n in o for o in options)), None)
    if name is None:
        return False
    for key in trials.added.pop(place, ()):  # the last one did not help
        del trials.attributes[key]
    tried.append(name)
    trials.added[place] = []
    for item, paths in zip(items, options, strict=True):
        key = (paths[name], name)
        if key not in trials.attributes:
            trials.attributes[key] = item.part
            trials.added[place].append(key)
        trials.scope.table.unify(trials.attributes[key], item.part)  # one number: they stay equal
    return True


def _candidates(trials: _Trials, item: Literal) -> dict[str, str]:
    """Map attributes that equal a number to the module that holds them.

    First those of the innermost module, last those that follow another axis already. One that
    follows this axis is no explanation of a number that does not.
    """
    scope, resolve = trials.scope, trials.scope.table.resolve
    size = scope.table.measure(item.part)
    known: dict[str, str] = {}
    found: dict[str, str] = {}
    for path in _modules(item.node):
        for name, value in vars(scope.model.get_submodule(path)).items():
            if type(value) is int and value == size:
                tree = trials.attributes.get((path, name))
                if tree is None:
                    found.setdefault(name, path)
                elif resolve(tree) != resolve(item.part):
                    known.setdefault(name, path)
    return found | known


def _modules(node: Node) -> list[str]:
    """List the modules whose forward an operator was recorded in, innermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [re.sub(r"@\d+", "", path) for path, _ in reversed([*stack])]


def _line(node: Node) -> tuple[str, str] | None:
    """Name file and line of the model's code where an operator was recorded."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return found[-1] if found else None


def _scales(trials: _Trials, found: Difference, atoms: list[int]) -> bool:
    """Note a number that follows the root of a size, and what makes up for it."""
    scope, node = trials.scope, found.node
    old, new = numbers(node), found.numbers
    if new is None or len(old) != 1 or len(new) != 1 or operator_name(node) not in ("mul", "div"):
        return False
    sizes = _sizes(scope, atoms)
    for tree, _ in _summed_before(scope, node):
        ratio = tree_size(tree, sizes) / scope.table.measure(tree)
        for power in (0.5, -0.5, 1.0, -1.0):
            if ratio != 1 and abs(new[0] / old[0] / ratio**power - 1) < 1e-9:
                _follow(trials, node, power)
                return True
    return False


def _follow(trials: _Trials, node: Node, power: float) -> None:
    """Let the layers before a scale, at every place where the code has it, follow its size."""
    for other in (n for n in trials.nodes if trials.places[n] == trials.places[node]):
        for tree, source in _summed_before(trials.scope, other)[:1]:
            trials.scope.scales[other] = (tree, power)
            sign = 1 if operator_name(other) == "div" else -1
            follow_size(trials.scope, other, source, tree, sign * power)


def _summed_before(scope: Scope, node: Node) -> list[tuple[Tree, Node]]:
    """List sizes that a scale may belong to, with the tensor that it multiplies.

    That is what the product before it sums over, or the last dimension of the tensor itself.
    """
    source = node.all_input_nodes[0]
    trees = [scope.contracted.get(source), *scope.values.get(source, [])[-1:]]
    return [(scope.table.resolve(tree), source) for tree in trees if tree is not None]
