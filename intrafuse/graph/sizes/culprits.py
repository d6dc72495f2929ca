"""Find by bisection the sizes that a model's code does not tolerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from intrafuse.graph.sizes.trials import Trials

__all__ = ["Culprits"]

RISES = 4  # most times that trials of parts of the sizes run further than before


@dataclass
class Culprits:
    """Finds the atoms at which a model fails.

    Most trials stop where all atoms together failed, because atoms that get past that operator are
    not its culprits. One trial of all others to the end then shows whether any of them fails later.

    Attributes:
        trials: the results of the trials so far. `Trials.failure` is the last failure.
        run: tells whether a model agrees with the graph at other sizes of some atoms, up to a
            number of operators, or to the end (None).
        until: up to where trials run.
        failures: atoms at which the model failed, with the failure.
        agreed: atoms at which it did not, up to where.
    """

    trials: Trials
    run: Callable[[list[int], int | None], bool]
    until: int | None = None
    failures: dict[tuple[int, ...], str] = field(default_factory=dict[tuple[int, ...], str])
    agreed: dict[tuple[int, ...], int | None] = field(
        default_factory=dict[tuple[int, ...], int | None]
    )

    def lock(self, atoms: list[int], budget: int) -> list[int]:
        """Lock the culprits among some atoms at which the model fails together.

        Args:
            atoms: the atoms; their failure is `Trials.failure`.
            budget: most trials; then all atoms that are still open are locked.

        Returns:
            The atoms that were seen to agree together in a trial to the end.
        """
        self.failures[tuple(atoms)] = self.trials.failure
        guilty: dict[int, str] = {}
        agreeing: list[int] = []
        for left in range(RISES, -1, -1):
            guilty = self._guilty(atoms, budget)
            rest = [atom for atom in atoms if atom not in guilty]
            if self.until is None or not rest:
                break
            if self.run(rest, None):
                agreeing = rest
                break
            further = self.trials.agreed
            if further is not None and further < self.until:  # only some of them together fail
                break
            self.until = None if further is None or left == 1 else further + 1
        for atom, failure in guilty.items():
            reason = f"the code fails where its size is another{failure}"
            self.trials.scope.table.lock(atom, reason)
        return agreeing

    def _guilty(self, atoms: list[int], budget: int) -> dict[int, str]:
        """Map the culprits to their failures."""
        guilty: dict[int, str] = {}
        waiting = [atoms]
        while waiting:
            some = waiting.pop()
            budget -= 1
            if budget > 0 and self._works(some):
                continue
            if len(some) == 1 or budget <= 0:
                guilty |= dict.fromkeys(some, self.trials.failure)
                continue
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
        return guilty

    def _works(self, some: list[int]) -> bool:
        key = tuple(some)
        if key in self.failures:
            self.trials.failure = self.failures[key]
            return False
        if key in self.agreed and _covers(self.agreed[key], self.until):
            self.trials.failure = ""
            return True
        if self.run(some, self.until):
            self.agreed[key] = self.until
            return True
        self.failures[key] = self.trials.failure
        return False


def _covers(reached: int | None, until: int | None) -> bool:
    """Tell whether a trial up to one operator (None: the end) shows one up to another."""
    return reached is None or (until is not None and reached >= until)
