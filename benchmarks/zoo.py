"""Prune every architecture of the zoo, by `select` against a masked original and by every method.

    .venv/bin/python benchmarks/zoo.py                          # all of them, resumes
    .venv/bin/python benchmarks/zoo.py --only 'timm:res*'       # some
    .venv/bin/python benchmarks/zoo.py --write docs/architectures.md

Each architecture runs in a process of its own with a time limit. Results are added to a JSON file
as they come; a run skips what the file holds, but for failures with --retry.
A row passes if groups could be pruned, the pruned network equals the masked original to 1e-4 of
its largest output in float32, and forward and backward run. `refused` is a clear error or nothing
that could be pruned, `wrong` an output that differs, `error` anything else. What each method does
to the outputs is measured as `zoo_methods.py` says.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing as mp
import re
import statistics
import subprocess
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, build, import_torchvision
from zoo_methods import METHODS, SHARE, compare_methods, findings

import intrafuse
from intrafuse.graph.trace import as_arguments
from intrafuse.support.batches import tensors_of

HALF = 0.5  # of every group, for `select`


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="*", help="pattern of names, several separated by commas")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo.json"))
    parser.add_argument("--retry", action="store_true", help="run again what did not pass")
    parser.add_argument("--again", action="store_true", help="run again whatever is chosen")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each method")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--write", type=Path, help="write the table to this file, and run nothing")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.write is not None:
        options.write.write_text(page(rows))
        print(summary(rows))
        return
    torch.set_num_threads(1)
    import_torchvision()
    for library in ("timm", "transformers"):  # once, before the processes fork
        importlib.import_module(library)

    commit = _commit()
    patterns = options.only.split(",")
    waiting = [
        name
        for name in ARCHITECTURES
        if any(fnmatch.fnmatch(name, p) for p in patterns)
        and _is_open(rows.get(name, {}).get("status"), options)
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = {pool.submit(apart, name, options.limit): name for name in waiting}
        for job in as_completed(jobs):
            name = jobs[job]
            rows[name] = {**job.result(), "commit": commit}
            print(name, line(rows[name]), flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(rows, indent=1, sort_keys=True))
    print(summary(rows))


def _is_open(known: str | None, options: argparse.Namespace) -> bool:
    return known is None or options.again or (options.retry and known != "pass")


def apart(name: str, limit: float) -> dict[str, Any]:
    """Run one architecture in a process of its own."""
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_report, args=(name, limit, theirs))
    process.start()
    theirs.close()
    try:
        allowed = limit * (len(METHODS) + 2)
        row = (
            ours.recv() if ours.poll(allowed) else {"status": "error", "why": f"over {allowed:g} s"}
        )
    except EOFError:
        row = {"status": "error", "why": f"the process died with {process.exitcode}"}
    process.kill()
    process.join()
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _report(name: str, limit: float, pipe: Any) -> None:
    try:
        row = examine(name, limit)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row = {"status": "error", "why": f"{type(error).__name__}: {error} ({where})"[:600]}
    pipe.send(row)


def examine(name: str, limit: float = 120.0) -> dict[str, Any]:
    """Trace, prune and verify one architecture; refusals and wrong results become rows."""
    model, inputs = build(name)
    try:
        plan = intrafuse.plan(
            model, inputs, channels=HALF, method="select", importance="random", seed=1,
            include=["*"],  # the width that norms are taken over, too
        )  # fmt: skip
    except intrafuse.IntrafuseError as error:
        return {"status": "refused", "why": str(error)[:600], **_described(model, inputs)}
    row = describe(model, plan.graph) | {
        "graph": round(plan.seconds, 2),
        "removed": round(plan.removed["params"], 4),
    }
    try:
        found = intrafuse.verify(model, plan, example_inputs=inputs)
        row |= {"relative": found.relative, "effect": found.effect}
        small = plan.apply(model)
    except intrafuse.IntrafuseError as error:
        status = "wrong" if "masked original" in str(error) else "refused"
        return {**row, "status": status, "why": str(error)[:600]}
    backward(small, inputs)
    return {**row, "status": "pass", "methods": compare_methods(model, plan.graph, inputs, limit)}


def _described(model: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    """Describe a network that could not be planned for, where it can be traced at all."""
    try:
        return describe(model, intrafuse.trace(model, inputs, include=["*"]))
    except intrafuse.IntrafuseError:
        return {}


def describe(model: torch.nn.Module, graph: intrafuse.ChannelGraph) -> dict[str, Any]:
    """Count what of a network can be pruned, and why the rest cannot."""
    counted = {name: p.numel() for name, p in model.named_parameters()}
    free = {slot.parameter for group in graph.groups for slot in group.slots}
    reasons = Counter(_plain(group.locked[0]) for group in graph.locked)
    return {
        "params": sum(counted.values()),
        "prunable": round(
            sum(n for k, n in counted.items() if k in free) / sum(counted.values()), 4
        ),
        "groups": len(graph.groups),
        "locked": len(graph.locked),
        "reasons": dict(reasons.most_common()),
    }


def _plain(reason: str) -> str:
    return reason if len(reason) < 120 else reason[:117] + "..."


def backward(model: torch.nn.Module, inputs: Any) -> None:
    """Take gradients of every output in training mode, where dropout and batch norm are alive."""
    args, kwargs = as_arguments(inputs)
    outputs = [t for t in tensors_of(model.train()(*args, **kwargs)) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.shape != parameter.shape:
            raise AssertionError(f"a gradient of another shape: {name}")


def line(row: dict[str, Any]) -> str:
    figures = [
        f"{k}={row[k]:.3g}"
        for k in ("prunable", "removed", "relative", "effect", "graph", "seconds")
        if k in row
    ]
    methods = row.get("methods", {})
    figures += [f"{method}={_error(methods[method])}" for method in METHODS if method in methods]
    return " ".join([row["status"], *figures, row.get("why", ""), *findings(methods)])


def _error(value: float | str) -> str:
    return value.partition(":")[0] if isinstance(value, str) else f"{value:.3f}"


def summary(rows: dict[str, Any]) -> str:
    counted = Counter(row["status"] for row in rows.values())
    return f"{len(rows)} architectures: " + ", ".join(f"{n} {s}" for s, n in counted.most_common())


def page(rows: dict[str, Any]) -> str:
    """Write the table of docs/architectures.md."""
    ordered = [name for name in ARCHITECTURES if name in rows]
    body = "\n".join(_table_row(name, rows[name]) for name in ordered)
    passed = [row for row in rows.values() if row["status"] == "pass"]
    worst = max((row["relative"] for row in passed), default=0.0)
    prunable = statistics.median(row["prunable"] for row in passed) if passed else 0.0
    commits = Counter(row.get("commit", "earlier ones of the same day") for row in rows.values())
    measured = ", ".join(f"{commit} ({n})" for commit, n in commits.most_common())
    header = (
        "| architecture | result | prunable | removed | difference | graph, s | "
        f"{' | '.join(METHODS)} | what stays |"
    )
    found = {name: findings(rows[name].get("methods", {})) for name in ordered}
    worse = sum(bool(some) for some in found.values())
    return f"""# Architectures

{__doc__.strip().splitlines()[0]}

    .venv/bin/python benchmarks/zoo.py
    .venv/bin/python benchmarks/zoo.py --write docs/architectures.md

{summary(rows)} ({len(passed) / max(len(rows), 1):.1%} pass). Random weights, small inputs, one
thread. Over those that pass, the largest difference is {worst:.1e} of the largest output, and the
median share of the parameters that can be pruned is {prunable:.0%}. Measured at the commits
{measured}.

- **result**: `pass` where groups could be pruned, the pruned network equals the masked original to
  1e-4 of its largest output in float32, and forward and backward run (backward in training mode);
  `refused` where nothing could be pruned, or a clear error said why not.
- **prunable**: share of the parameters on an axis of which some group may shrink.
- **graph**: seconds for the trace and the plan, on a machine that other work shared.
- **removed**: share of the parameters that goes with half of every group's channels; the width
  that layer norms and RMS norms are taken over among them, as `include=["*"]` asks.
- **difference**: of the largest output, between pruned network and masked original.
- **{", ".join(METHODS)}**: relative error of the outputs on unseen random inputs where each
  of these removes {SHARE:.0%} of the channels of a few groups, and one of every kind at least
  (`benchmarks/zoo_methods.py`), the statistics of batch norm estimated on random inputs before.
  {worse} rows have a finding: a crash, an output that is not finite, or `moment` more than a tenth
  above `select`.
- **what stays**: why groups are locked, with their number, the two commonest reasons but for the
  model's own output.

{FINDINGS}
Heads that only training runs (`aux_logits` of googlenet and inception_v3) are no part of a trace:
they are switched off here, and would keep the sizes that they had.

{header}
|---|---|---|---|---|---|---|---|---|---|---|
{body}
"""


FINDINGS = """## Where `moment` does worse than `select`

Weights here are random: no two channels are alike, and merging can only lose. Trained networks are
another matter ([results.md](results.md)). What the rows show beyond that:

- Recurrent layers have no moment rules. Nothing is known of what their readers read, and
  `moment` merges as `folding` does.
- Units that are a product of two layers (SwiGLU), and depthwise stacks: the mean of two products
  is not the product of two means. `Moment(transport="none")`, which `auto` tries, selects such
  units and re-solves their readers: hf:olmo2, layer 0: `select` 0.377, `moment` 0.419, without
  transport 0.304.
- Attention over positions whose means differ, as position embeddings make them in small vision
  transformers: moments know one mean for all positions, and heads that are re-solved from it err
  more than selected ones (hf:deit, layer 0, width of heads: 0.039, selected 0.015). `auto`
  selects them.
- hf:olmo2 is built with weights of deviation 0.125, which keeps the variance of a layer 64 wide.
  With the 0.02 that suits a width of 4096 the eps of its norms decides what comes out, and
  moments, which bound the spread of attention from above, miss it: `select` 0.216, `moment`
  0.611.
"""


def _table_row(name: str, row: dict[str, Any]) -> str:
    shares = [f"{row[key]:.0%}" if key in row else "" for key in ("prunable", "removed")]
    difference = f"{row['relative']:.0e}" if "relative" in row else ""
    graph = f"{row['graph']:.1f}" if "graph" in row else ""
    why = Counter()
    for reason, count in row.get("reasons", {}).items():
        if reason not in ("model output", "a single channel"):
            why[re.sub(r" at \S+?:\d+", "", reason).replace("|", "/")] += count
    stays = "; ".join(f"{reason} ({count})" for reason, count in why.most_common(2))
    if row["status"] != "pass" and not row.get("reasons"):
        stays = " ".join(row["why"].split())[:160].replace("|", "/")
    errors = [_error(row.get("methods", {}).get(method, "")) for method in METHODS]
    return f"| {' | '.join([name, row['status'], *shares, difference, graph, *errors, stays])} |"


if __name__ == "__main__":
    main()
