"""Find out by trials which sizes in a model's code follow when channels are removed.

Code contains many sizes: `x.view(b, t, self.heads, -1)`, `x[..., : x.shape[-1] // 2]`, a literal
64. A trace shows only numbers. So a trial builds a copy of the model, without values, that has
other sizes in every prunable group, and traces it again. If a number changes as the graph expects,
the code computes it from shapes. If not, the number may come from an attribute of the module: the
next trial changes the attribute, too. Sizes that do not follow in the end are locked, and so is
attention with a scale that no layer before it can correct. A last trial with smaller sizes finds
numbers, such as quotients, that agreed by chance.
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
from intrafuse.graph.record import Each
from intrafuse.graph.rules import Scope, line_of, operator_name
from intrafuse.graph.sizes.compare import (
    Difference,
    Expected,
    Following,
    Stop,
    calls,
    first_difference,
    numbers,
)
from intrafuse.graph.sizes.culprits import Culprits
from intrafuse.graph.sizes.explain import follow_names, give_up, learn, reconsider
from intrafuse.graph.sizes.trials import Trials
from intrafuse.graph.sizes.unread import follow_unread, watch
from intrafuse.support.errors import IntrafuseError

__all__ = ["Workshop", "settle"]

Export = Callable[[nn.Module], Any]
Record = Callable[[nn.Module, Each], Any]
Build = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Mapping[str, int]]], nn.Module]
# Operators whose number argument may be a size.
ARITHMETIC = frozenset("add sub rsub mul div pow multiply divide true_divide floor_divide".split())
ROUNDS = 24  # most trials; sizes that are still open are locked


class _Elsewhere(Exception):
    """Raised if a model fails at another size outside the operators of the trace.

    Attributes:
        lines: (file, line) of each call, innermost last.
        where: the innermost line and its exception, for use in a sentence.
    """

    def __init__(self, lines: list[tuple[str, str]], cause: BaseException) -> None:
        super().__init__(lines)
        self.lines = lines
        name, line = lines[-1] if lines else ("", "")
        text = next(iter(str(cause).splitlines()), "")
        self.where = f" at {name.rpartition('/')[2]}:{line}: {type(cause).__name__}: {text}"


@dataclass(frozen=True)
class Workshop:
    """Functions that build a model at other sizes and run it.

    Attributes:
        build: makes a copy of the model with other parameter shapes and attributes.
        record: lists all operators that a model runs, including those without any use. After each
            operator it calls a function that may raise an exception to stop the model.
        export: lists the operators that an export keeps.
        cached: lists the operators of a model that builds a cache for its next call; None if the
            model does not do so by default.
    """

    build: Build
    record: Record
    export: Export
    cached: Export | None = None


def settle(
    scope: Scope, nodes: list[Node], free: Callable[[], list[int]], workshop: Workshop
) -> None:
    """Lock sizes that the code does not follow, and record the attributes that it needs.

    Args:
        scope: the trace; its literals are the open questions.
        nodes: the operators of the trace.
        free: lists the atoms that may be pruned at present.
        workshop: runs the model at other sizes.
    """
    trials = Trials(scope, nodes)
    follow_names(trials)
    if _open(scope, nodes, free()):
        _explore(trials, free, workshop)
    trials.smaller = True  # a number that agreed by chance does not agree again
    works = partial(_works, trials, workshop)
    if not follow_unread(trials, free(), works) and _open(scope, nodes, free()):
        _explore(trials, free, workshop)
        follow_unread(trials, free(), works)
    if workshop.cached is not None:
        _lock_uncached(trials, free(), workshop)
    for (module, name), tree in trials.attributes.items():
        scope.attributes.append(Attribute(module, name, tree))


def _explore(trials: Trials, free: Callable[[], list[int]], workshop: Workshop) -> None:
    """Run the model at other sizes, and learn from each trial, until it agrees with the graph."""
    works = partial(_works, trials, workshop)
    agreeing: list[int] = []
    for left in range(ROUNDS, 0, -1):
        atoms = free()
        try:
            trials.failure, trials.agreed = "", None
            tried = atoms and atoms != agreeing
            difference = _trial(trials, atoms, workshop) if tried else None
            if difference is None:
                trials.attempt = None  # the last attribute was right
                return
            trials.note(difference)
            learnt = reconsider(trials, difference) or learn(trials, difference, atoms)
        except _Elsewhere as failure:
            trials.failure = failure.where
            learnt = reconsider(trials, None) or give_up(trials, failure.lines, atoms)
        if not learnt:
            agreeing = Culprits(trials, works, trials.until).lock(atoms, left)
    for atom in free():
        trials.scope.table.lock(atom, "no trial of the code at other sizes succeeded")


def _lock_uncached(trials: Trials, atoms: list[int], workshop: Workshop) -> None:
    """Lock the sizes at which a model fails in its default mode, in which it builds a cache."""

    def works(some: list[int], _until: int | None = None) -> bool:
        assert workshop.cached is not None
        trials.failure = ""
        try:
            workshop.cached(workshop.build(*_resized(trials, trials.sizes(some))))
        except IntrafuseError as error:
            trials.failure = f" in its default mode, at {error.layer}"
            return False
        return True

    if atoms and not works(atoms):
        failure = trials.failure
        if works([]):
            trials.failure = failure
            Culprits(trials, works).lock(atoms, ROUNDS)


def _works(trials: Trials, workshop: Workshop, atoms: list[int], until: int | None = None) -> bool:
    trials.failure, trials.agreed = "", None
    try:
        difference = _trial(trials, atoms, workshop, until) if atoms else None
    except _Elsewhere as failure:
        trials.failure = failure.where
        return False
    if difference is not None:
        trials.note(difference)
    return difference is None


def _open(scope: Scope, nodes: list[Node], atoms: list[int]) -> bool:
    """Tell whether any number in the code may belong to the given prunable atoms.

    A number in arithmetic with tensors may be the size of any axis.
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
    """Compute shapes of parameters and attributes of modules at other sizes."""
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


def _trial(
    trials: Trials, atoms: list[int], workshop: Workshop, until: int | None = None
) -> Difference | None:
    """Run the model at other sizes, up to the first operator that differs.

    Args:
        trials: the results of the trials so far.
        atoms: the atoms whose sizes change.
        workshop: builds and runs the model.
        until: how many operators to run; None for all.

    Returns:
        None if the model agrees with the graph, else the first difference. An operator that fails
        is a difference.
    """
    sizes = trials.sizes(atoms)
    expected = _expected(trials)
    shapes, attributes = _resized(trials, sizes)
    try:
        model = workshop.build(shapes, attributes)
        watch(model, trials.reads)
        new = workshop.record(model, Following(expected, sizes, until))
    except IntrafuseError as error:
        cause = error.__cause__ or error
        if isinstance(cause, Stop):
            return cause.difference
        return _failure(trials, expected, sizes, cause)
    different = first_difference(expected, new, sizes)
    if different is not None and not different.explained:
        return first_difference(expected, workshop.export(model), sizes)
    return different


def _expected(trials: Trials) -> Expected:
    scope, resolve = trials.scope, trials.scope.table.resolve
    scales = {node: (resolve(tree), power) for node, (tree, power) in scope.scales.items()}
    starts = {node: resolve(tree) for node, tree in scope.starts.items()}
    old = dict(enumerate(scope.table.size))
    return Expected(trials.nodes, scope.resolved(), scales, starts, old)


def _failure(
    trials: Trials, expected: Expected, sizes: Mapping[int, int], cause: BaseException
) -> Difference:
    """Find the operator at which a model fails at other sizes."""
    ran = recorded(cause)
    different = first_difference(expected, ran, sizes, whole=False)
    lines = _lines(cause)
    done = calls(ran)
    failed = done.pop() if done and "val" not in done[-1].meta else None
    following = calls(trials.nodes)[len(done) :]
    if different is None and not (following and line_of(following[0]) in lines):
        raise _Elsewhere(lines, cause) from cause
    return different or Difference(following[0], "runs", "an error", failed=failed)
