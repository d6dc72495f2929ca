"""Auto: for each group, the candidate with the smallest predicted error of its readers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from intrafuse.graph.groups import ChannelGroup
from intrafuse.methods.folding import Folding
from intrafuse.methods.intra_fusion import IntraFusion
from intrafuse.methods.method import Method
from intrafuse.methods.moment import fused
from intrafuse.methods.select import Select
from intrafuse.moments.explain import explaining_channels
from intrafuse.moments.readout import predicted_error, with_readout
from intrafuse.moments.sources import MomentSource, Source
from intrafuse.support.arguments import check_choices
from intrafuse.surgery.context import Context
from intrafuse.surgery.merge_map import MergeMap

__all__ = ["Auto"]

USUAL, MARGIN = "moment, folding", 0.1


@dataclass(frozen=True, kw_only=True)
class Auto(MomentSource, Method):
    """Try several maps for each group, and choose the one with the smallest predicted error.

    Three candidates are the maps of `select`, `intra-fusion` and `folding`. Five more take the
    writers of these three, of greedily selected or of greedily transported channels, and re-solve
    the readers by moments. `intrafuse.moments.readout.predicted_error` predicts the error. Folding
    with moments does best on most networks, and predictions are uncertain, so another candidate
    is chosen only if its error is smaller by a tenth. The notes of the plan and the report hold
    the choice and the predicted error of each candidate.
    """

    name: ClassVar[str] = "auto"
    folds_batchnorm: ClassVar[bool] = True
    order: ClassVar[Literal["forward", "backward"]] = "forward"

    def __post_init__(self) -> None:
        check_choices(self, {"source": Source})
        super().__post_init__()

    def __call__(
        self, group: ChannelGroup, scores: Tensor, width: int, context: Context
    ) -> MergeMap:
        plain = {
            method.name: method(group, scores, width, context)
            for method in (Select(), IntraFusion(), Folding())
        }
        known = self.readings(group, context.weights, context)
        if not known:  # no moments to predict with
            note: dict[str, Any] = {"chosen": "folding", "predicted": {}}
            return replace(plain["folding"], note=note)
        greedy = explaining_channels(list(known.values()), width)
        writers = {
            **plain,
            "greedy": MergeMap.select(group.name, len(scores), greedy),
            "fused": fused(group, greedy, context),
        }
        candidates: dict[str, MergeMap] = {}
        predicted: dict[str, float] = {}
        beside = self.readings_beside(group, list(writers.values()), context)
        for (name, merge_map), reading in zip(writers.items(), beside, strict=True):
            solved = with_readout(
                merge_map, reading, context.weights, ridge=self.ridge, max_gain=self.max_gain
            )
            tried = {f"moment, {name}": solved}
            if name in plain:
                tried[name] = merge_map
            for title, candidate in tried.items():
                candidates[title] = candidate
                predicted[title] = predicted_error(candidate, reading, context.weights)
        best = min(predicted, key=predicted.__getitem__)
        if predicted[best] > (1 - MARGIN) * predicted[USUAL]:
            best = USUAL
        rounded = {title: round(error, 6) for title, error in sorted(predicted.items())}
        return replace(candidates[best], note={"chosen": best, "predicted": rounded})
