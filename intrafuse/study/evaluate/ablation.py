"""Test whether a setting matters: the Kruskal-Wallis test over groups and shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from intrafuse.catalog.data import Images
from intrafuse.graph import ExampleInputs
from intrafuse.methods import IntraFusion
from intrafuse.study.evaluate.sensitivity import each_group_alone
from intrafuse.support.errors import IntrafuseError

__all__ = ["MARGINALS", "NORMALISATIONS", "ORDERS", "TARGETS", "Ablation", "ablation"]

MARGINALS = {
    f"{t[0]}T{s[0]}S": {"method": IntraFusion(source_marginal=s, target_marginal=t)}
    for t in ("uniform", "importance")
    for s in ("uniform", "importance")
}
"""Uniform or importance-based target and source masses (section 5.3): uTuS, uTiS, iTuS, iTiS."""
TARGETS = {
    name: {"method": IntraFusion(target=name)} for name in ("important", "k-means", "mixture")
}
ORDERS = {f"p={p}": {"method": IntraFusion(p=p)} for p in (1, 2)}
NORMALISATIONS = {n: {"method": IntraFusion(normalisation=n)} for n in ("paper", "barycentric")}
METRICS = {n: {"importance": n} for n in ("l1", "l2", "linf", "lamp", "fpgm", "random")}
"""Importance metrics that need no data (appendix C.4)."""
SETTINGS = {
    "marginals": MARGINALS,
    "targets": TARGETS,
    "orders": ORDERS,
    "normalisations": NORMALISATIONS,
    "metrics": METRICS,
}


@dataclass(frozen=True)
class Ablation:
    """Accuracies by setting, and a test of whether they differ.

    Attributes:
        accuracies: setting -> percent for every group and share, in the same order.
        statistic: H of the Kruskal-Wallis test.
        p_value: the probability of at least this H if the settings do not differ.
    """

    accuracies: Mapping[str, tuple[float, ...]]
    statistic: float
    p_value: float

    @classmethod
    def of(cls, accuracies: Mapping[str, Sequence[float]]) -> Ablation:
        """Test accuracies. If all are equal, H is 0 and p is 1.

        >>> round(Ablation.of({"a": [1, 2, 3], "b": [4, 5, 6]}).statistic, 3)
        3.857
        """
        samples = {name: tuple(map(float, values)) for name, values in accuracies.items()}
        if len({value for values in samples.values() for value in values}) < 2:
            return cls(samples, 0.0, 1.0)
        from scipy.stats import kruskal  # slow to import

        test = kruskal(*samples.values())
        return cls(samples, float(test.statistic), float(test.pvalue))

    @classmethod
    def pooled(cls, ablations: Sequence[Ablation]) -> Ablation:
        """Test the same settings over several networks at once.

        >>> one = Ablation.of({"a": [1, 2], "b": [3, 4]})
        >>> Ablation.pooled([one, one]).accuracies["a"]
        (1.0, 2.0, 1.0, 2.0)
        """
        names = ablations[0].accuracies
        return cls.of(
            {n: [value for one in ablations for value in one.accuracies[n]] for n in names}
        )

    def as_data(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)


def ablation(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Images,
    settings: Mapping[str, Mapping[str, Any]] = MARGINALS,
    *,
    shares: Sequence[float] = (0.3, 0.5, 0.7),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Ablation:
    """Prune each group alone with each setting, and test whether the settings differ.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 5.3 and appendix C.3.

    Args:
        model: the network; it is not changed.
        example_inputs: inputs to trace the network with.
        data: labeled images.
        settings: arguments of `prune` by name, such as `MARGINALS`, `TARGETS`, `ORDERS`,
            `NORMALISATIONS`, or {"l1": {"importance": "l1"}, "random": {"importance": "random"}}.
        shares: shares of channels to remove.
        include, exclude: patterns of groups.
        seed: seed of all random choices.
        device: device of the model.
        progress: called with (networks measured, networks in total).

    Raises:
        IntrafuseError: there are fewer than two settings, or as for `prune` and `accuracy`.
    """
    if len(settings) < 2:
        raise IntrafuseError("an ablation must compare at least two settings", value=len(settings))
    common: Any = {"include": include, "exclude": exclude, "seed": seed, "device": device}
    results = each_group_alone(
        model, example_inputs, data, settings, shares=shares, progress=progress, **common
    )
    return Ablation.of(
        {
            name: [value for by_name in results.values() for value in by_name[name]]
            for name in settings
        }
    )
