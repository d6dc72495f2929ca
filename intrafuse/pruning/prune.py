"""One model in, one model out: plan and prune."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from intrafuse.allocation.budget import KINDS, Budget, Figures, Scope, choose_widths, measure
from intrafuse.allocation.latency import LatencyModel
from intrafuse.allocation.patterns import choose_groups
from intrafuse.allocation.timing import Latency, latencies
from intrafuse.graph import ExampleInputs, trace
from intrafuse.importance.metrics import Importance, score
from intrafuse.methods import Method, resolve_method
from intrafuse.methods.settings import check_choice
from intrafuse.moments.damage import damage_by_width
from intrafuse.moments.synthetic import synthesise
from intrafuse.pruning.each_group import merge_groups
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.repair import Repair, reestimate_batchnorm
from intrafuse.pruning.verification.proof import Check
from intrafuse.pruning.verification.proof import check as prove
from intrafuse.support.arguments import check_arguments
from intrafuse.support.batches import require_rereadable
from intrafuse.support.calls import apart
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.tables import text_table
from intrafuse.surgery.batchnorm import fold_norms
from intrafuse.surgery.context import Context
from intrafuse.surgery.weights import Weights

__all__ = ["Pruned", "Report", "plan", "prune"]

OBSERVED = 6  # networks that are timed while widths for a budget of latency are chosen


@dataclass(frozen=True)
class Report:
    """What a pruning was asked to do and did.

    Attributes:
        wanted: the budget: {kind: share to remove}.
        reached: shares removed of channels, params and macs, in [0, 1].
        before, after: sizes of the network.
        seconds: time for tracing, planning and surgery (and repair, where asked for).
        latency: of a call, measured "before" and "after"; empty but for a budget of latency.
        notes: what the method says of its choices, by group name: for `auto` what was "chosen",
            and the "predicted" error of each candidate.
        check: how the network was proved, None where that was switched off; its seconds are apart.
        unclear: numbers that modules hold, as "module.name", that no traced code read and that may
            name several axes: these had one size and now have several, so the numbers stay.
    """

    wanted: Mapping[str, float]
    reached: Mapping[str, float]
    before: Figures
    after: Figures
    seconds: float
    latency: Mapping[str, Latency] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Check | None = None
    unclear: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            [
                kind,
                f"{getattr(self.before, kind):,}",
                f"{getattr(self.after, kind):,}",
                f"{self.reached[kind]:.1%}",
                f"{self.wanted[kind]:.1%}" if kind in self.wanted else "",
            ]
            for kind in KINDS
        ]
        if self.latency:
            before, after = (self.latency[name].median for name in ("before", "after"))
            milliseconds = ["latency (ms)", f"{before:.3f}", f"{after:.3f}"]
            rows.append(
                [*milliseconds, f"{1 - after / before:.1%}", f"{self.wanted['latency']:.1%}"]
            )
        header = ["", "before", "after", "removed", "wanted"]
        table = text_table(f"Pruned in {self.seconds:.2f} s", header, rows, numbers=(1, 2, 3, 4))
        header, rows = self.choices()
        table += text_table("Choices", header, rows, numbers=(2,)) if rows else ""
        return "\n".join([table.rstrip("\n"), *self.remarks()])

    def remarks(self) -> list[str]:
        """Say how the network was checked, and what may need a look."""
        found = [] if self.check is None else [str(self.check)]
        if self.unclear:
            shown = ", ".join(self.unclear[:6]) + (", ..." if len(self.unclear) > 6 else "")
            found.append(f"Not followed, because they may name several sizes: {shown}")
        return found

    def choices(self) -> tuple[list[str], list[list[str]]]:
        """Give header and rows of what was chosen for each group, beside the best of the others."""
        rows = []
        for group, note in self.notes.items():
            errors = dict(note.get("predicted", {}))
            chosen = note.get("chosen", "")
            own = errors.pop(chosen, None)
            other = min(errors, key=errors.__getitem__, default=None)
            next_best = "" if other is None else f"{other} ({errors[other]:.4f})"
            rows.append([group, chosen, "" if own is None else f"{own:.4f}", next_best])
        return ["group", "chosen", "predicted error", "best of the others"], rows


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network with the plan that made it and a report."""

    model: nn.Module
    plan: Plan
    report: Report


@apart
def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    channels: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    method: str | Method = "intra-fusion",
    importance: str | Importance = "l1",
    scope: Scope = "uniform",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    floor: float = 0.1,
    round_to: int = 1,
    data: Iterable | None = None,
    seed: int = 0,
    repair: Literal["analytic"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decide what happens to each channel group; change nothing.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of args or a mapping of kwargs to trace it with.
        channels, params, macs, latency: the budget, exactly one of them: the share to remove, in
            [0, 1). Latency is that of a call with the example inputs where the model is, predicted
            from some networks that are timed (`LatencyModel`).
        method: `select`, `intra-fusion`, `folding`, or a method with settings of your own, such
            as `IntraFusion(p=2)`.
        importance: a metric's name, or a callable `(group, context) -> scores (channels,)`.
        scope: `uniform` removes the same share in every group; `global` ranks all channels
            together; `predicted` removes where the moments predict least damage for what is
            saved. With the last two every group keeps at least the share `floor`.
        include, exclude: patterns of group or layer names; by default every prunable group.
        overrides: share of channels to remove, by pattern.
        floor: share of its channels that a group keeps at least under `global`.
        round_to: make widths multiples of this.
        data: batches of inputs or of (inputs, labels), for metrics that need them.
        seed: seeds everything random.
        repair: `analytic` gives the readers of each group the gains and shifts that restore mean
            and variance of what they write, from analytic moments (`moment` and `auto` do so
            anyway).
        progress: called with (groups done, groups in all), and before, where a method makes
            synthetic inputs, with (steps done, steps in all).

    Returns:
        The plan; `print` it, `save` it, or `apply` it.

    Raises:
        IntrafuseError: see the table of errors in the documentation.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan(net, torch.zeros(1, 4), channels=0.5).widths
    {'0': 4}
    """
    started = time.perf_counter()
    overrides = {} if overrides is None else overrides
    check_arguments(include=include, exclude=exclude, seed=seed, progress=progress)
    budget = Budget.of(
        {"channels": channels, "params": params, "macs": macs, "latency": latency},
        scope=scope,
        floor=floor,
        round_to=round_to,
        overrides=overrides,
    )
    require_rereadable(data)
    _require_plannable(repair)
    chosen = resolve_method(method)
    graph = trace(model, example_inputs, include=include or ())
    groups = choose_groups(graph, include, exclude)
    weights = Weights.of(graph, model)
    before = measure(graph, graph.sizes, weights.counted())
    if chosen.folds_batchnorm:
        fold_norms(weights)
    original = weights.snapshot()
    context = Context(weights, original, model, example_inputs, data, seed, progress)
    scores = {group.name: score(group, context, importance) for group in groups}
    damage = damage_by_width(groups, _folded(weights)) if scope == "predicted" else None
    choose = partial(choose_widths, graph, groups, scores, budget, damage=damage)
    if budget.kind == "latency":
        widths, predicted = _settle(choose, LatencyModel(model, graph, groups, example_inputs))
    else:
        widths, predicted = choose(amount=_counting(budget.kind, original, before)), None
    maps = merge_groups(chosen, groups, scores, widths, context, repair=repair)
    settings = {
        "method": _describe(chosen),
        "importance": importance if isinstance(importance, str) else _name(importance),
        "budget": asdict(budget),
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "seed": seed,
        "repair": repair,
        "latency": predicted,
    }
    after = measure(graph, weights.sizes, weights.counted()) if maps else before
    fold = chosen.folds_batchnorm and bool(maps)
    return Plan(graph, maps, fold, settings, before, after, time.perf_counter() - started)


@apart
def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    channels: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    method: str | Method = "intra-fusion",
    importance: str | Importance = "l1",
    scope: Scope = "uniform",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    floor: float = 0.1,
    round_to: int = 1,
    data: Iterable | None = None,
    seed: int = 0,
    repair: Repair | None = None,
    inplace: bool = False,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Make a network smaller.

    The arguments are those of `plan`, and:

    Args:
        repair: `batchnorm` re-estimates the statistics of batch norm from `data` (unlabelled),
            `synthetic` from inputs made without data (`synthesise`); `analytic` as for `plan`.
        inplace: change `model` itself; by default it stays untouched.
        check: run the result, and its widths as a plan of `select` against the original with the
            other channels silenced; an error instead of a network that is wrong.

    Returns:
        The pruned network, its plan and a report.

    Raises:
        IntrafuseError: as for `plan`; also a repair that is unknown or lacks data, and a result
            that the check finds wrong.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, torch.zeros(1, 4), channels=0.5).model[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    started = time.perf_counter()
    check_arguments(inplace=inplace, check=check)
    check_choice("repair", repair, Repair, optional=True)
    if repair == "batchnorm" and data is None:
        raise IntrafuseError(
            "repair of batch norm needs unlabelled data",
            usage=True,
            remedy='give data= (on the command line --data), or repair="synthetic"',
        )
    made = plan(
        model,
        example_inputs,
        channels=channels,
        params=params,
        macs=macs,
        latency=latency,
        method=method,
        importance=importance,
        scope=scope,
        include=include,
        exclude=exclude,
        overrides=overrides,
        floor=floor,
        round_to=round_to,
        data=data,
        seed=seed,
        repair="analytic" if repair == "analytic" else None,
        progress=progress,
    )
    smaller = made.apply(model)
    proof = prove(model, smaller, made, example_inputs) if check else None
    took = (
        latencies({"before": model, "after": smaller}, example_inputs)
        if latency is not None
        else {}
    )
    if repair == "synthetic":
        data = synthesise(model, example_inputs, seed=seed, progress=progress)
    if repair in ("batchnorm", "synthetic"):
        assert data is not None
        smaller = reestimate_batchnorm(model, smaller, made, data, inplace=inplace)
    elif inplace:
        smaller = made.apply(model, inplace=True)
    budget: Mapping[str, Any] = made.settings["budget"]
    seconds = time.perf_counter() - started - (proof.seconds if proof else 0.0)
    report = Report(
        {budget["kind"]: budget["share"]},
        made.removed,
        made.before,
        made.after,
        seconds,
        took,
        made.notes,
        proof,
        made.graph.unclear(made.graph.resized(made.widths)),
    )
    return Pruned(smaller, made, report)


def _folded(weights: Weights) -> Weights:
    """Return the tensors with batch norm folded, whether or not the method asks for it."""
    if weights.statistics:
        return weights
    copy = weights.snapshot()
    fold_norms(copy)
    return copy


def _counting(kind: str, weights: Weights, before: Figures) -> Callable[[Mapping[str, int]], float]:
    """Make the function that counts what a budget is of, at some widths of groups."""
    graph, counted = weights.graph, weights.counted()

    def amount(widths: Mapping[str, int]) -> float:
        shrinks = any(width < graph.by_name[name].size for name, width in widths.items())
        found = measure(graph, graph.resized(widths), counted) if shrinks else before
        return getattr(found, kind)

    return amount


def _settle(
    choose: Callable[..., dict[str, int]], timed: LatencyModel
) -> tuple[dict[str, int], dict[str, float]]:
    """Choose widths by predicted latency, time them, and choose again until nothing changes.

    Returns:
        The widths, and the predicted milliseconds "before" and "after".
    """
    widths = choose(amount=timed.milliseconds)
    for _ in range(OBSERVED):
        timed.observe(widths)
        known, widths = widths, choose(amount=timed.milliseconds)
        if widths == known:
            break
    return widths, {"before": timed.milliseconds({}), "after": timed.milliseconds(widths)}


def _require_plannable(repair: str | None) -> None:
    if repair not in (None, "analytic"):
        raise IntrafuseError(
            "repair of a plan must be analytic, or None",
            value=repair,
            usage=True,
            remedy="intrafuse.prune repairs batch norm",
        )


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _describe(method: Method) -> dict[str, Any]:
    settings = asdict(method) if is_dataclass(method) else {}  # type: ignore[call-overload]
    return {"name": getattr(method, "name", _name(method)), **settings}
