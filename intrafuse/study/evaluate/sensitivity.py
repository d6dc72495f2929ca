"""Measure which groups tolerate pruning: each group alone, by share and method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from intrafuse.allocation.patterns import choose_groups
from intrafuse.catalog.data import Images
from intrafuse.graph import ExampleInputs, trace
from intrafuse.pruning.prune import prune
from intrafuse.study.evaluate.accuracy import accuracy
from intrafuse.support.errors import IntrafuseError

__all__ = ["GroupSensitivity", "Sensitivity", "each_group_alone", "sensitivity"]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class GroupSensitivity:
    """Accuracy in percent with one group pruned by one method, for each share."""

    group: str
    method: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The accuracy lost by pruning each group alone.

    Attributes:
        original: accuracy of the network in percent.
        shares: removed shares of channels.
        rows: one row for each group and method.
    """

    original: float
    shares: tuple[float, ...]
    rows: tuple[GroupSensitivity, ...]

    def ranking(self, method: str) -> list[tuple[str, float]]:
        """Order groups from the most volatile to the most resilient.

        Args:
            method: name of the method.

        Returns:
            (group, mean points of accuracy lost over the shares).
        """
        lost = [
            (row.group, self.original - sum(row.accuracies) / len(row.accuracies))
            for row in self.rows
            if row.method == method
        ]
        return sorted(lost, key=lambda pair: -pair[1])

    def as_data(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)


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
    """Prune each group alone, and measure the accuracy.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", appendix E.

    Args:
        model: the network; it is not changed.
        example_inputs: inputs to trace the network with.
        data: labeled images.
        shares: shares of channels to remove.
        methods: names of methods.
        include, exclude: patterns of groups.
        seed: seed of all random choices.
        device: device of the model.
        progress: called with (networks measured, networks in total).

    Raises:
        IntrafuseError: as for `prune` and `accuracy`.
    """

    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total + 1)  # plus one for the original

    settings = {method: {"method": method} for method in methods}
    common: Any = {"include": include, "exclude": exclude, "seed": seed, "device": device}
    results = each_group_alone(
        model, example_inputs, data, settings, shares=shares, progress=advance, **common
    )
    rows = [
        GroupSensitivity(group, method, accuracies)
        for group, by_method in results.items()
        for method, accuracies in by_method.items()
    ]
    original = accuracy(model, data, device=device)
    advance(len(rows) * len(shares) + 1, len(rows) * len(shares))
    return Sensitivity(original, tuple(shares), tuple(rows))


def each_group_alone(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Images,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    shares: Sequence[float],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Prune one group at a time with every setting, and measure each network.

    Args:
        settings: arguments of `prune` by name.
        model, example_inputs, data, shares, include, exclude, seed, device, progress: as for
            `sensitivity`.

    Returns:
        {group: {setting: accuracy in percent for each share}}.

    Raises:
        IntrafuseError: there are no groups, or as for `prune` and `accuracy`.
    """
    graph = trace(model, example_inputs, include=include or ())
    groups = choose_groups(graph, include, exclude)
    if not groups:
        raise IntrafuseError(
            "there is no channel group to prune",
            value={"include": include, "exclude": exclude},
            remedy="intrafuse inspect lists the groups of a network",
        )
    total = len(groups) * len(settings) * len(shares)
    results: dict[str, dict[str, tuple[float, ...]]] = {}
    done = 0
    for group in groups:
        results[group.name] = {}
        for name, arguments in settings.items():
            accuracies = []
            for share in shares:
                common: Any = {"include": [group.name], "seed": seed, **arguments}
                pruned = prune(model, graph, channels=share, **common)
                accuracies.append(accuracy(pruned.model, data, device=device))
                done += 1
                if progress is not None:
                    progress(done, total)
            results[group.name][name] = tuple(accuracies)
    return results
