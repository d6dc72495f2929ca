"""Which groups bear pruning: every group alone, by share and method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from intrafuse.data import Images
from intrafuse.evaluate.accuracy import accuracy
from intrafuse.graph import ExampleInputs, trace
from intrafuse.patterns import choose_groups
from intrafuse.prune import prune

__all__ = ["GroupSensitivity", "Sensitivity", "sensitivity"]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class GroupSensitivity:
    """Accuracy in percent with one group pruned by one method, for each share."""

    group: str
    method: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What pruning each group alone costs.

    Attributes:
        original: accuracy of the network in percent.
        shares: of channels removed.
        rows: one for each group and method.
    """

    original: float
    shares: tuple[float, ...]
    rows: tuple[GroupSensitivity, ...]

    def ranking(self, method: str) -> list[tuple[str, float]]:
        """Order groups from the most volatile to the most resilient.

        Args:
            method: whose rows count.

        Returns:
            (group, points of accuracy lost on average over the shares).
        """
        lost = [
            (row.group, self.original - sum(row.accuracies) / len(row.accuracies))
            for row in self.rows
            if row.method == method
        ]
        return sorted(lost, key=lambda pair: -pair[1])


def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Images,
    *,
    shares: Sequence[float] = SHARES,
    methods: Sequence[str] = ("select", "intra-fusion"),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Prune every group alone, and measure what is left.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", appendix E.

    Args:
        model: the network; it is not changed.
        example_inputs: what it is traced with.
        data: labelled images.
        shares: of channels to remove.
        methods: names of methods.
        include, exclude: patterns of groups.
        seed: of everything random.
        device: where the model is.
        progress: called with (networks measured, networks in all).

    Raises:
        IntrafuseError: as `prune` and `accuracy`.
    """
    groups = choose_groups(trace(model, example_inputs), include, exclude)
    total = len(groups) * len(methods) * len(shares) + 1
    done = 0

    def measure(network: nn.Module) -> float:
        nonlocal done
        found = accuracy(network, data, device=device)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    original = measure(model)
    rows = []
    for group in groups:
        for method in methods:
            smaller = partial(
                prune, model, example_inputs, method=method, include=[group.name], seed=seed
            )
            found = tuple(measure(smaller(channels=share).model) for share in shares)
            rows.append(GroupSensitivity(group.name, method, found))
    return Sensitivity(original, tuple(shares), tuple(rows))
