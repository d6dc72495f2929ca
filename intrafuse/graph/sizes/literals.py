"""Find out by trial which sizes in a model's code follow when channels go.

Code is full of sizes: `x.view(b, t, self.heads, -1)`, `x[..., : x.shape[-1] // 2]`, a literal 64.
A trace shows numbers only. So a copy of the model is given other sizes in every group that may be
pruned, without any values, and is traced again: a number that changed as the graph expects was
computed from shapes. One that did not may come from an attribute of the module; then the attribute
is changed as well, and the trial repeated. What does not follow in the end is locked. So is
attention whose scale follows the width in a way that no layer before it can make up for. A last
trial with smaller sizes tells what agreed by chance, as quotients do.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Node

from intrafuse.graph.axes import leaves, tree_size
from intrafuse.graph.export import recorded
from intrafuse.graph.groups import Attribute
from intrafuse.graph.rules import Scope, line_of, operator_name
from intrafuse.graph.sizes.compare import Difference, Expected, calls, first_difference, numbers
from intrafuse.graph.sizes.explain import follow_names, give_up, learn, reconsider
from intrafuse.graph.sizes.trials import Trials
from intrafuse.graph.sizes.unread import follow_unread, watch
from intrafuse.support.errors import IntrafuseError

__all__ = ["Workshop", "settle"]

Export = Callable[[nn.Module], Any]
Build = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Mapping[str, int]]], nn.Module]
# Operators whose number may be a size.
ARITHMETIC = frozenset("add sub rsub mul div pow multiply divide true_divide floor_divide".split())
ROUNDS = 24  # of trials; what is open after them is locked


class _Elsewhere(Exception):
    """Raised where a model fails at another size, but not in an operator of the trace.

    Attributes:
        lines: (file, line) of each call, innermost last.
        where: the last of them, and what was raised there, for a sentence.
    """

    def __init__(self, lines: list[tuple[str, str]], cause: BaseException) -> None:
        super().__init__(lines)
        self.lines = lines
        name, line = lines[-1] if lines else ("", "")
        text = next(iter(str(cause).splitlines()), "")
        self.where = f" at {name.rpartition('/')[2]}:{line}: {type(cause).__name__}: {text}"


@dataclass(frozen=True)
class Workshop:
    """How a model is put together and run at other sizes.

    Attributes:
        build: makes a copy of the model with parameters of other shapes, and other attributes.
        record: lists the operators that a model runs; those that lead nowhere are among them.
        export: lists those that an export keeps.
        cached: lists those that it runs where it makes a cache for its next call; None where it
            makes none by default.
    """

    build: Build
    record: Export
    export: Export
    cached: Export | None = None


def settle(
    scope: Scope, nodes: list[Node], free: Callable[[], list[int]], workshop: Workshop
) -> None:
    """Lock the sizes that the code does not follow, and note the attributes that it needs.

    Args:
        scope: the trace; its literals are what is open.
        nodes: its operators.
        free: lists the atoms that may be pruned now.
        workshop: runs the model at other sizes.
    """
    trials = Trials(scope, nodes)
    follow_names(trials)
    if _open(scope, nodes, free()):
        _explore(trials, free, workshop)
    trials.smaller = True  # what agreed by chance, as quotients do, does not agree again
    works = partial(_works, trials, workshop=workshop)
    if not follow_unread(trials, free(), works) and _open(scope, nodes, free()):
        _explore(trials, free, workshop)
        follow_unread(trials, free(), works)
    if workshop.cached is not None:
        _lock_uncached(trials, free(), workshop)
    for (module, name), tree in trials.attributes.items():
        scope.attributes.append(Attribute(module, name, tree))


def _explore(trials: Trials, free: Callable[[], list[int]], workshop: Workshop) -> None:
    """Run the model at other sizes, and learn, until it does what the graph expects."""
    works = partial(_works, trials, workshop=workshop)
    for left in range(ROUNDS, 0, -1):
        atoms = free()
        try:
            found = _trial(trials, atoms, workshop) if atoms else None
            if found is None:
                trials.attempt = None  # it was right
                return
            learnt = reconsider(trials, found) or learn(trials, found, atoms)
        except _Elsewhere as failure:
            trials.failure = failure.where
            learnt = reconsider(trials, None) or give_up(trials, failure.lines, atoms)
        if not learnt:
            _lock_culprits(trials, atoms, works, left)
    for atom in free():
        trials.scope.table.lock(atom, "no trial of the code at other sizes succeeded")


def _lock_uncached(trials: Trials, atoms: list[int], workshop: Workshop) -> None:
    """Lock the sizes at which a model fails in its default mode, where it makes a cache."""

    def works(some: list[int]) -> bool:
        assert workshop.cached is not None
        trials.failure = ""
        try:
            workshop.cached(workshop.build(*_resized(trials, trials.sizes(some))))
        except IntrafuseError as error:
            trials.failure = f" in its default mode, at {error.layer}"
            return False
        return True

    if atoms and not works(atoms) and works([]):
        _lock_culprits(trials, atoms, works, ROUNDS)


def _works(trials: Trials, atoms: list[int], workshop: Workshop) -> bool:
    trials.failure = ""
    try:
        return not atoms or _trial(trials, atoms, workshop) is None
    except _Elsewhere as failure:
        trials.failure = failure.where
        return False


def _lock_culprits(
    trials: Trials, atoms: list[int], works: Callable[[list[int]], bool], budget: int
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
                reason = f"the code fails where its size is another{trials.failure}"
                trials.scope.table.lock(atom, reason)
            continue
        waiting += [some[: len(some) // 2], some[len(some) // 2 :]]


def _open(scope: Scope, nodes: list[Node], atoms: list[int]) -> bool:
    """Tell whether some number in the code may belong to the atoms that may be pruned.

    A number that tensors are multiplied with may be the size of any axis.
    """
    wanted = set(atoms)
    trees = [item.axis for item in scope.literals] + [tree for _, _, tree in scope.heads]
    if any(not wanted.isdisjoint(leaves(scope.table.resolve(tree))) for tree in trees):
        return True
    return bool(atoms) and any(
        operator_name(node) in ARITHMETIC and numbers(node) for node in calls(nodes)
    )


def _resized(
    trials: Trials, sizes: Mapping[int, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, int]]]:
    """List shapes of parameters and attributes of modules at other sizes."""
    scope, resolve = trials.scope, trials.scope.table.resolve
    shapes = {
        name: tuple(tree_size(resolve(tree), sizes) for tree in trees)
        for name, trees in scope.parameter_axes.items()
    }
    attributes: dict[str, dict[str, int]] = {}
    known = [((a.module, a.name), a.tree) for a in scope.attributes]
    for (module, name), tree in [*known, *trials.attributes.items()]:
        attributes.setdefault(module, {})[name] = tree_size(resolve(tree), sizes)
    return shapes, attributes


def _lines(cause: BaseException) -> list[tuple[str, str]]:
    return [(f.filename, str(f.lineno)) for f in traceback.extract_tb(cause.__traceback__)]


def _trial(trials: Trials, atoms: list[int], workshop: Workshop) -> Difference | None:
    """Run the model at other sizes.

    Returns:
        None where it does what the graph expects, else the first difference. An operator that
        fails is one.
    """
    scope = trials.scope
    sizes, resolve = trials.sizes(atoms), scope.table.resolve
    shapes, attributes = _resized(trials, sizes)
    values = {
        node: [[*map(resolve, v)] if isinstance(v, list) else resolve(v) for v in value]
        for node, value in scope.values.items()
    }
    scales = {node: (resolve(tree), power) for node, (tree, power) in scope.scales.items()}
    starts = {node: resolve(tree) for node, tree in scope.starts.items()}
    old = dict(enumerate(scope.table.size))
    expected = Expected(trials.nodes, values, scales, starts, old)
    try:
        model = workshop.build(shapes, attributes)
        watch(model, trials.reads)
        new = workshop.record(model)
    except IntrafuseError as error:
        cause = error.__cause__ or error
        ran = recorded(cause)
        found = first_difference(expected, ran, sizes, whole=False)
        lines = _lines(cause)
        done = calls(ran)
        failed = done.pop() if done and "val" not in done[-1].meta else None
        following = calls(trials.nodes)[len(done) :]
        if found is None and not (following and line_of(following[0]) in lines):
            raise _Elsewhere(lines, cause) from error
        return found or Difference(following[0], "runs", "an error", failed=failed)
    found = first_difference(expected, new, sizes)
    if found is not None and not found.explained:
        return first_difference(expected, workshop.export(model), sizes)
    return found
