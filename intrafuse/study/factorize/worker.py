"""One worker: it receives a recipe and the positions of its images, and saves a network.

Workers exchange no other data, neither with each other nor with the main process. The command
`python -m intrafuse.study.factorize FOLDER` runs the worker of FOLDER/task.json. It stops when its
standard input closes, so it does not outlive the main process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from intrafuse.catalog.data import load_data
from intrafuse.study.factorize.recipe import Recipe
from intrafuse.study.factorize.splits import read_positions
from intrafuse.study.factorize.stages import Line, Report
from intrafuse.support.device import pick_device
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing

__all__ = ["POSITIONS", "PROGRESS", "TASK", "Task", "last_stage", "main", "work"]

TASK, POSITIONS, PROGRESS = "task.json", "positions.npy", "progress.json"
PAUSE = 0.5  # seconds between two reports


class Task(BaseModel):
    """The task of one worker.

    Attributes:
        recipe: the recipe of the whole training.
        part: number of the part, from 1.
        threads: number of PyTorch threads.
        device: device to compute on; the worker resolves `auto`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    part: int
    threads: int
    device: str = "cpu"


def last_stage(recipe: Recipe) -> str:
    """Return the name of the stage whose network a worker returns."""
    return f"pruned-{recipe.pruning.steps}" if recipe.scheme == "paf" else "trained"


def work(folder: Path, report: Report) -> Path:
    """Train on one part, and prune if the scheme is `paf`.

    Args:
        folder: the folder with task and positions; the stages are kept in it.
        report: called with (stage, steps done, steps in total).

    Returns:
        The folder of the last stage.
    """
    task = Task.model_validate_json((folder / TASK).read_text("utf-8"))
    recipe = task.recipe
    torch.set_num_threads(task.threads)
    if recipe.splits.scheme == "places":
        spec = recipe.splits.files[task.part - 1]
        data, test = load_data(spec, split="train"), load_data(spec)
    else:
        data, test = load_data(recipe.data, split="train"), load_data(recipe.data)
        data = data.subset(torch.from_numpy(read_positions(folder / POSITIONS)))
    line = Line(folder, recipe, task.part, data, test, str(pick_device(task.device)), report)
    network = line.trained()
    if recipe.scheme == "paf":
        line.pruned(network)
    return folder / last_stage(recipe)


def throttled(say: Callable[[str, int, int], None]) -> Report:
    """Report at most twice per second, and at each start and end of a stage."""
    last, stage = 0.0, ""

    def report(name: str, done: int, total: int) -> None:
        nonlocal last, stage
        now = time.monotonic()
        if name != stage or done == total or now - last > PAUSE:
            last, stage = now, name
            say(name, done, total)

    return report


def _stop_with_parent() -> None:
    """Exit when standard input closes, because the main process has ended."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock the interpreter takes at exit
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run the worker of the folder that the command line names."""
    _stop_with_parent()
    folder = Path(sys.argv[1])

    def say(name: str, done: int, total: int) -> None:
        with replacing(folder / PROGRESS) as temporary:
            temporary.write_text(json.dumps([name, done, total]), "utf-8")

    try:
        work(folder, throttled(say))
    except IntrafuseError as error:
        print(f"intrafuse: error: {error}", file=sys.stderr)  # noqa: T201 - the worker's log
        sys.exit(2 if error.usage else 1)
