"""Run a factorized training from one recipe: split, train in parallel, prune and fuse."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intrafuse.catalog.data import Images, load_data
from intrafuse.checkpoint.folder import MANIFEST
from intrafuse.checkpoint.manifest import Manifest
from intrafuse.fusing.fuse import fuse
from intrafuse.methods import resolve_method
from intrafuse.pruning.prune import plan
from intrafuse.study.evaluate import accuracy
from intrafuse.study.factorize.cluster import run_ray
from intrafuse.study.factorize.local import run_local
from intrafuse.study.factorize.recipe import Recipe, read_recipe, write_recipe
from intrafuse.study.factorize.result import Result, write_result
from intrafuse.study.factorize.splits import split, write_positions
from intrafuse.study.factorize.stages import (
    Line,
    Network,
    Record,
    Report,
    is_whole,
    load_network,
    read_records,
)
from intrafuse.study.factorize.worker import POSITIONS, TASK, Task, last_stage
from intrafuse.study.report.kinds.factorized import timeline
from intrafuse.support.arguments import check_arguments, check_choice
from intrafuse.support.device import pick_device
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import folder_target, replacing, replacing_folder, sweep

__all__ = ["NETWORK", "RECIPE", "Factorized", "Workers", "factorize"]

RECIPE, NETWORK, PARTS, TIMELINE = "recipe.yaml", "network", "parts", "timeline.png"
REPAIRED = 500  # images for estimating statistics in repair
TRIED = 8  # test images for the first check, which runs and prunes a random network
Workers = Literal["local", "ray"]


@dataclass(frozen=True, eq=False)
class Factorized:
    """The outcome of a factorized training.

    Attributes:
        model: the small network.
        result: times, sizes and accuracies of all stages.
        folder: the folder of the run.
    """

    model: nn.Module
    result: Result
    folder: Path


def factorize(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: Workers = "local",
    address: str | None = None,
    parallel: int | None = None,
    threads: int | None = None,
    retries: int = 1,
    device: str = "auto",
    progress: Report | None = None,
) -> Factorized:
    """Train networks on parts of the data in parallel, and fuse them into one small network.

    Theus et al., "Towards Meta-Pruning via Optimal Transport", section 6 and appendix D. The
    workers share nothing: each receives the recipe and the positions of its images, and returns a
    network. A second call with the same recipe and folder resumes a stopped run. The resulting
    network is the same (bit for bit on a CPU with the same numbers of threads).

    Args:
        recipe: the settings.
        out: folder of the run: a new folder, or the folder of a run of the same recipe.
        workers: `local` processes, or `ray` tasks.
        address: address of a Ray cluster. None uses the running Ray, or starts it here.
        parallel: number of workers at once; by default one for each part, up to the number of
            cores.
        threads: threads of each worker; by default the cores are divided among the workers. For
            fusing, and for `whole`, PyTorch's setting applies.
        retries: number of restarts of a failed worker.
        device: device to compute on; by default each worker uses a GPU if it finds one.
        progress: called with (stage, steps done, steps in total).

    Returns:
        The network, and records of all stages. The folder holds `recipe.yaml`, `network` (for
        `intrafuse.load`), `result.json`, the positions and stages of every part, and, if
        matplotlib is installed, `timeline.png`.

    Raises:
        IntrafuseError: the folder belongs to another run, a worker failed after all retries
            (finished work of other workers is kept), or a stage failed.

    >>> import tempfile
    >>> short = {"epochs": 1}
    >>> recipe = Recipe(scheme="whole", model="mlp", training=short, pruned=short, fused=short)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = factorize(recipe, folder)
    >>> [record.name for record in found.result.records]
    ['trained', 'pruned-1', 'tuned']
    """
    check_arguments(out=out, device=device, progress=progress)
    check_choice("workers", workers, Workers)
    if not isinstance(recipe, Recipe):
        remedy = "use make_recipe or read_recipe of intrafuse.study.factorize"
        raise IntrafuseError("recipe must be a Recipe", value=recipe, remedy=remedy, usage=True)
    for name, value in (("parallel", parallel), ("threads", threads)):
        if value is not None:
            _check_count(name, value, 1)
    _check_count("retries", retries, 0)
    started = time.time()
    folder = folder_target(out)
    run = _Run(recipe, folder, device, progress or (lambda name, done, total: None))
    run.check()
    _open(folder, recipe)
    if recipe.scheme == "whole":
        network = run.whole()
    else:
        run.prepare(parallel, threads)
        run.work(workers, address, retries)
        network = run.joint()
    result = Result(
        recipe.scheme,
        None if recipe.scheme == "whole" else workers,
        run.parallel,
        run.threads,
        tuple(run.records),
        *run.moved(),
        time.time() - started,
    )
    with replacing_folder(folder / NETWORK) as temporary:
        shutil.copytree(folder / run.records[-1].name, temporary, dirs_exist_ok=True)
    record = write_result(result, recipe.model_dump(mode="json"), folder)
    if find_spec("matplotlib") is not None:
        timeline({recipe.scheme: record}).write(folder / TIMELINE)
    return Factorized(network.model, result, folder)


def _check_count(name: str, value: int, least: int) -> None:
    if type(value) is int and value >= least:
        return
    raise IntrafuseError(
        f"{name} must be a whole number of {least} or more", value=value, usage=True
    )


def _open(folder: Path, recipe: Recipe) -> None:
    """Make the folder of a run, or check that an existing one has the same recipe."""
    known = folder / RECIPE
    sweep(folder)
    if _is_there(known):
        if read_recipe(known) != recipe or _made_otherwise(folder, recipe):
            raise IntrafuseError(
                "the folder holds a run of another recipe",
                value=str(folder),
                remedy=f"choose another folder, or resume with the unchanged --recipe {known}",
                usage=True,
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise IntrafuseError(
            "the output must be a new folder, or the folder of a run", value=str(folder), usage=True
        )
    else:
        write_recipe(recipe, known)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # no permission
        raise IntrafuseError(
            f"the output cannot be read: {error.strerror}",
            value=str(path.parent),
            remedy="choose another folder",
        ) from error
    return True


def _made_otherwise(folder: Path, recipe: Recipe) -> bool:
    """Tell whether another recipe made a kept stage, because the recipe file was edited."""
    for place in (folder, *sorted((folder / PARTS).glob("*"))):
        for manifest in sorted(place.glob(f"*/{MANIFEST}")):
            with suppress(IntrafuseError):  # a broken stage is made again
                if Manifest.read(manifest).figures.get("recipe") not in (None, recipe.digest):
                    return True
    return False


@dataclass(eq=False)
class _Run:
    """A run in progress: its folders, tasks and records."""

    recipe: Recipe
    folder: Path
    device: str
    report: Report
    records: list[Record] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    parallel: int = 1
    parts: Sequence[Tensor | None] = ()

    @cached_property
    def train(self) -> Images:
        """All training images."""
        return load_data(self.recipe.data, split="train")

    @cached_property
    def test(self) -> Images:
        """The test images."""
        return load_data(self.recipe.data)

    def check(self) -> None:
        """Load, build, try and split everything that the recipe names, before writing files."""
        recipe = self.recipe
        pick_device(self.device)
        self._try(self.test.take(TRIED))
        if recipe.splits.scheme == "places":
            self.parts = [None] * len(recipe.splits.files)
        elif recipe.scheme != "whole":
            self.parts = split(recipe.splits, self.train.labels, seed=recipe.seed)

    def _try(self, images: Images) -> None:
        """Run and prune a random network, to find errors before the training."""
        how = self.recipe.pruning
        resolve_method(how.method)
        found = Line(self.folder, self.recipe, 0, images, None).resolve()
        accuracy(found.model, images)
        readable = self.recipe.open or self.recipe.scheme == "paf"
        plan(
            found.model,
            found.example_inputs,
            channels=how.share,
            method="select",
            importance=how.importance,
            exclude=how.exclude,
            data=list(images.batches()) if readable else None,
        )

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return self.tasks[0].threads if self.tasks else torch.get_num_threads()

    def whole(self) -> Network:
        """Train, prune and fine-tune on all data."""
        line = self._line(self.train)
        network = line.pruned(line.trained())
        return line.stage("tuned", lambda: network, self.recipe.fused)

    def prepare(self, parallel: int | None, threads: int | None) -> None:
        """Give every worker a folder with its task."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.parallel = min(parallel or cores or 1, len(self.parts))
        threads = threads or max(1, (cores or 1) // self.parallel)
        for number, positions in enumerate(self.parts, 1):
            folder = self.folder / PARTS / str(number)
            task = Task(recipe=self.recipe, part=number, threads=threads, device=self.device)
            with replacing(folder / TASK) as temporary:
                temporary.write_text(task.model_dump_json(), "utf-8")
            if positions is not None:
                write_positions(positions, folder / POSITIONS)
            self.folders.append(folder)
            self.tasks.append(task)

    def work(self, workers: Workers, address: str | None, retries: int) -> None:
        """Run the workers that have not finished."""
        last = last_stage(self.recipe)
        waiting = [i for i, folder in enumerate(self.folders) if not is_whole(folder / last)]
        folders, tasks = [self.folders[i] for i in waiting], [self.tasks[i] for i in waiting]
        how: Any = {"parallel": self.parallel, "retries": retries, "report": self.report}
        if not waiting:
            failed = []
        elif workers == "ray":
            failed = run_ray(folders, tasks, address=address, **how)
        else:
            failed = run_local(folders, tasks, **how)
        if failed:
            reasons = "; ".join(f"part {one.part}: {one.reason}" for one in failed)
            raise IntrafuseError(
                f"{len(failed)} of {len(self.tasks)} workers failed: {reasons}",
                remedy="call again with the same recipe and folder: finished work is kept",
            )
        for folder in self.folders:
            self.records += read_records(folder / last)

    def joint(self) -> Network:
        """Fuse the workers' networks; fine-tune and prune the result according to the scheme."""
        recipe = self.recipe
        line = self._line(self.train if recipe.open else None)
        network = line.stage("fused", lambda: self._fused(line), recipe.fused)
        return line.pruned(network) if recipe.scheme == "fap" else network

    def _fused(self, line: Line) -> Network:
        how, last = self.recipe.fusing, last_stage(self.recipe)
        found = [load_network(folder / last, line.resolve().model) for folder in self.folders]
        features, repair = how.features, how.repair
        if features == "auto":
            features = "activations" if self.recipe.open else "weights"
        if repair == "auto":
            repair = "batchnorm" if self.recipe.open else "analytic"
        made = fuse(
            [network.model.to(line.device) for network in found],
            line.resolve().example_inputs,
            features=features,
            samples=how.samples,
            method=how.method,
            repair=None if repair == "none" else repair,
            data=line.some(max(REPAIRED, how.samples)),
            seed=self.recipe.seed,
        )
        return Network(made.model, made.plan or found[0].plan)

    def _line(self, data: Images | None) -> Line:
        device = str(pick_device(self.device))
        common = (self.test, device, self.report, self.records)
        return Line(self.folder, self.recipe, 0, data, *common)

    def moved(self) -> tuple[int, int]:
        """Count the bytes sent to all workers, and received from them."""
        sent = [folder / name for folder in self.folders for name in (TASK, POSITIONS)]
        last = [folder / last_stage(self.recipe) for folder in self.folders]
        received = [path for folder in last for path in folder.iterdir()]
        sizes = [sum(p.stat().st_size for p in paths if p.exists()) for paths in (sent, received)]
        return sizes[0], sizes[1]
