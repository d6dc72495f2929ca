"""What `plan` and streaming do before the first map: scores, widths, and the state of planning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from intrafuse.allocation.budget import Figures, choose_widths, measure
from intrafuse.allocation.latency import LatencyModel
from intrafuse.allocation.patterns import choose_groups
from intrafuse.graph.groups import ChannelGroup
from intrafuse.importance.metrics import score
from intrafuse.moments.damage import damage_by_width
from intrafuse.pruning.settings import Settings, name_of
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = ["Prepared", "describe", "prepare"]

OBSERVED = 6  # most networks to time while choosing widths for a latency budget


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network that is ready to be scored and merged.

    Attributes:
        asked: the settings.
        groups: the groups that may be pruned, from input to output.
        context: the state of planning; its weights have batch norm folded if the method asks for
            it.
        before: the size of the network.
    """

    asked: Settings
    groups: list[ChannelGroup]
    context: Context
    before: Figures

    def scores(
        self,
        known: Mapping[str, Tensor] | None = None,
        note: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Score the channels of each group.

        Args:
            known: scores of groups that need not be computed again.
            note: called with the scores so far, after each group.
        """
        found = dict(known or {})
        for group in self.groups:
            if group.name not in found:
                found[group.name] = score(group, self.context, self.asked.importance)
                if note is not None:
                    note(found)
        return found

    def widths(
        self, scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, int], dict[str, float] | None]:
        """Choose the widths of groups; for a latency budget, also predict the latency."""
        budget, context, groups = self.asked.wanted, self.context, self.groups
        graph = context.weights.graph
        predicts = budget.scope == "predicted"
        damage = damage_by_width(groups, _folded(context.weights)) if predicts else None
        choose = partial(choose_widths, graph, groups, scores, budget, damage=damage)
        if budget.kind == "latency":
            timed = LatencyModel(context.model, graph, groups, context.example_inputs)
            return _settle(choose, timed)
        return choose(amount=_counting(budget.kind, context.original, self.before)), None


def prepare(
    asked: Settings,
    weights: Weights,
    model: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Choose the groups, fold batch norm if the method asks for it, and open the context."""
    graph = weights.graph
    groups = choose_groups(graph, asked.include, asked.exclude)
    before = measure(graph, graph.sizes, weights.counted())
    if asked.compression.folds_batchnorm:
        fold_norms(weights)
    context = Context(
        weights, weights.snapshot(), model, graph.program.example_inputs, data, int(asked.seed),
        progress,
    )  # fmt: skip
    return Prepared(asked, groups, context, before)


def _folded(weights: Weights) -> Weights:
    """Return the tensors with batch norm folded, even if the method does not fold it."""
    if weights.statistics:
        return weights
    copy = weights.snapshot()
    fold_norms(copy)
    return copy


def _counting(kind: str, weights: Weights, before: Figures) -> Callable[[Mapping[str, int]], float]:
    """Return a function from group widths to the size that a budget limits."""
    graph, counted = weights.graph, weights.counted()

    def amount(widths: Mapping[str, int]) -> float:
        shrinks = any(width < graph.by_name[name].size for name, width in widths.items())
        figures = measure(graph, graph.resized(widths), counted) if shrinks else before
        return getattr(figures, kind)

    return amount


def _settle(
    choose: Callable[..., dict[str, int]], timed: LatencyModel
) -> tuple[dict[str, int], dict[str, float]]:
    """Choose widths by predicted latency, time them, and repeat until the widths stay the same.

    Returns:
        The widths, and the predicted latency "before" and "after" in milliseconds.
    """
    widths = choose(amount=timed.milliseconds)
    for _ in range(OBSERVED):
        timed.observe(widths)
        known, widths = widths, choose(amount=timed.milliseconds)
        if widths == known:
            break
    return widths, {"before": timed.milliseconds({}), "after": timed.milliseconds(widths)}


def describe(asked: Settings) -> dict[str, Any]:
    """Return the settings of a plan as JSON data."""
    importance = asked.importance
    return {
        "method": asked.compression.as_data(),
        "importance": importance if isinstance(importance, str) else name_of(importance),
        "budget": asdict(asked.wanted),
        "include": None if asked.include is None else list(asked.include),
        "exclude": list(asked.exclude),
        "seed": asked.seed,
        "repair": asked.repair,
    }
