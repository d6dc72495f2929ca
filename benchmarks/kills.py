"""Kill everything that writes files at each of its file events, and see what is lost or left.

    .venv/bin/python benchmarks/kills.py

Each row forks a process for every file event of one job (a file opened for writing, a name made,
changed or removed), and kills it right before that event. What stood under the name, or what
replaces it, must then be readable; after the next run of the job nothing else may be left. In the
rows "two renames" names cannot be exchanged in one step, as on macOS and network file systems.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import intrafuse
from intrafuse.checkpoint.folder import WEIGHTS
from intrafuse.study.factorize import factorize
from intrafuse.study.factorize.recipe import make_recipe
from intrafuse.study.factorize.splits import write_positions
from intrafuse.study.factorize.worker import POSITIONS, TASK, Task, work
from intrafuse.study.report.page import draw_pictures, write_report
from intrafuse.study.report.record import as_record, write_record
from intrafuse.support import files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from forks import killed
from records import RECORDS

ONCE = {"epochs": 1, "batch": 128}
SMALL: dict[str, Any] = {"model": "mlp", "arguments": {"hidden": [8]}}
RECIPES = {
    scheme: make_recipe(
        {"scheme": scheme, **SMALL, "training": ONCE, "pruned": ONCE, "fused": ONCE}
    )
    for scheme in ("whole", "paf", "fap")
}
PICTURES = ("ablation", "cost")


@dataclass(frozen=True)
class Job:
    """Something that writes.

    Attributes:
        work: writes into a folder.
        prepare: what stands there before.
        is_whole: whether what must be there can be read, right after a kill.
    """

    work: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    is_whole: Callable[[Path], bool] = lambda folder: True


def network(seed: int) -> nn.Module:
    """Make a small network."""
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def save(folder: Path, seed: int = 1) -> None:
    """Save a network."""
    intrafuse.save(folder / "net", network(seed))


def loads(folder: Path, *, new: bool = False) -> bool:
    """Tell whether the old or the new network can be loaded."""
    if new and not (folder / "net").exists():
        return True
    found = intrafuse.load(folder / "net", nn.Linear(3, 2))
    return any(torch.equal(found.weight, network(seed).weight) for seed in (0, 1))


def record(folder: Path) -> None:
    """Write the records that a report shows."""
    for kind in PICTURES:
        write_record(folder / f"{kind}.json", as_record(kind, RECORDS[kind]))


def part(folder: Path) -> None:
    """Give a worker its task."""
    write_positions(torch.arange(300), folder / POSITIONS)
    task = Task(recipe=RECIPES["paf"], part=1, threads=1)
    with files.replacing(folder / TASK) as temporary:
        temporary.write_text(task.model_dump_json())


def train(folder: Path) -> None:
    """Work on one part, as a worker does."""
    part(folder)
    work(folder, lambda name, done, total: None)


def jobs(finished: dict[str, Path]) -> dict[str, Job]:
    """List what is tried; runs that are finished are begun again from there."""
    old = partial(save, seed=0)
    found = {
        "save": Job(save, is_whole=partial(loads, new=True)),
        "save, replacing": Job(save, old, loads),
        "record": Job(record),
        "report": Job(lambda folder: write_report([folder], folder / "report.html"), record),
        "plot": Job(lambda folder: draw_pictures([folder], folder / "pictures"), record),
        "worker of paf": Job(train, part),
    }
    for scheme, recipe in RECIPES.items():
        again = partial(shutil.copytree, finished[scheme], dirs_exist_ok=True)
        run = partial(factorize, recipe, parallel=2)
        if scheme == "whole":
            found["factorize whole"] = Job(run)
        found[f"factorize {scheme}, from its parts"] = Job(run, partial(parts, finished[scheme]))
        found[f"factorize {scheme}, finished"] = Job(run, again)
    return found


def parts(source: Path, folder: Path) -> None:
    """Copy a run without what follows its first stages."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("fused", "tuned", "pruned-1", "network"):
        shutil.rmtree(folder / name, ignore_errors=True)


def contents(folder: Path) -> dict[str, object]:
    """List the files of a folder, those of networks with their weights."""
    return {
        str(path.relative_to(folder)): path.name == WEIGHTS and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", default="", help="only those whose name holds this")
    parser.add_argument("--step", type=int, default=1, help="try one event in so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'job':34} {'kills':>6} {'lost':>5} {'left':>5} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as root:
        finished = {scheme: Path(root, scheme) for scheme in RECIPES}
        for scheme, folder in finished.items():
            factorize(RECIPES[scheme], folder)
        for name, job in jobs(finished).items():
            if options.jobs in name:
                row(name, job, options.step)
                if "replacing" in name:
                    exchange, files._exchange = files._exchange, lambda one, other: False
                    row(f"{name}, two renames", job, options.step)
                    files._exchange = exchange


def row(name: str, job: Job, step: int) -> None:
    """Kill one job at its events, and print what came of it."""
    start, kills, lost, left = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        whole.mkdir()
        job.prepare(whole)
        job.work(whole)
        expected = contents(whole)
        for at in itertools.count(0, step):
            folder = Path(root, str(at))
            folder.mkdir()
            job.prepare(folder)
            came = killed(partial(job.work, folder), at)
            lost += not job.is_whole(folder)
            job.work(folder)
            found = contents(folder)
            lost += any(found.get(path) != value for path, value in expected.items())
            left += len(found.keys() - expected.keys())
            if not came:
                break
            kills += 1
            shutil.rmtree(folder)
    print(f"{name:34} {kills:>6} {lost:>5} {left:>5} {time.time() - start:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
