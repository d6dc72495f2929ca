"""The stages of a training, one after another. Each stage runs once and is kept in a folder.

A stage makes a network (new, pruned or fused), trains it, and saves it with a record. A second run
of the stage loads the saved network. A stopped training resumes after its last epoch, and a broken
folder is made again. The result depends only on recipe and seed.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import nn

from intrafuse.catalog.data import Images
from intrafuse.catalog.zoo import ResolvedModel, file_sha256, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, PLAN, load, save
from intrafuse.checkpoint.manifest import Manifest
from intrafuse.pruning.plan import Plan
from intrafuse.pruning.prune import prune
from intrafuse.study.evaluate import accuracy
from intrafuse.study.factorize.recipe import Recipe
from intrafuse.study.training import Training, train
from intrafuse.support.batches import map_tensors
from intrafuse.support.errors import IntrafuseError

__all__ = ["Line", "Network", "Record", "is_whole", "load_network", "read_records"]

Report = Callable[[str, int, int], None]
CALIBRATION, BATCH = 512, 64  # images for importance, moments and repair; images in a batch


@dataclass(frozen=True)
class Record:
    """The times, sizes and accuracies of one stage.

    Attributes:
        name: name of the stage: `trained`, `pruned-1`, `fused`, ...
        part: number of the part of the data, from 1; 0 for a stage outside the workers.
        start, end: seconds since 1970, of the attempt that finished the stage.
        making: seconds for pruning or fusing, without training.
        epochs, images: of the training.
        params: number of parameters of the network.
        before, accuracy: percent on the test images, before and after the training. None without
            test images; `before` is also None for the first training.
    """

    name: str
    part: int
    start: float
    end: float
    making: float
    epochs: int
    images: int
    params: int
    before: float | None = None
    accuracy: float | None = None

    @property
    def seconds(self) -> float:
        """The duration of the stage in seconds."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Network:
    """A network between two stages, and the plan that pruned it, if any."""

    model: nn.Module
    plan: Plan | None = None


@dataclass(eq=False)
class Line:
    """Stages in one folder, on one part of the data.

    Attributes:
        folder: the folder that holds one folder per stage.
        recipe: the settings.
        part: number of the part, from 1; 0 for all data.
        data: training images; None to skip training.
        test: images to measure accuracy on, or None.
        device: device to compute on.
        report: called with (stage, steps done, steps in total).
        records: records of the stages so far.
    """

    folder: Path
    recipe: Recipe
    part: int
    data: Images | None
    test: Images | None
    device: str = "cpu"
    report: Report = lambda name, done, total: None
    records: list[Record] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """The seed of this part."""
        return self.recipe.seed + self.part

    def trained(self) -> Network:
        """Train a new network."""

        def make() -> Network:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                return Network(self.resolve().model)

        return self.stage("trained", make, self.recipe.training)

    def pruned(self, network: Network) -> Network:
        """Prune a network in the steps of the recipe, with fine-tuning after each step."""
        for step in range(self.recipe.pruning.steps):
            make = partial(self._smaller, network)
            network = self.stage(f"pruned-{step + 1}", make, self.recipe.pruned)
        return network

    def _smaller(self, network: Network) -> Network:
        how = self.recipe.pruning
        made = prune(
            network.model,
            self.resolve().example_inputs,
            channels=how.share,
            method=how.method,
            importance=how.importance,
            exclude=how.exclude,
            data=self.some(CALIBRATION),
            seed=self.seed,
        )
        return Network(made.model, made.plan)

    def resolve(self) -> ResolvedModel:
        """Build a new network of the recipe's architecture, for the data's images."""
        images = self.data or self.test
        shape = None if images is None else images.input_shape
        made = resolve_model(self.recipe.model, input_shape=shape, **self.recipe.arguments)
        example = map_tensors(lambda tensor: tensor.to(self.device), made.example_inputs)
        model = copy.deepcopy(made.model)  # MODEL may name one module, not a factory
        return replace(made, model=model.to(self.device), example_inputs=example)

    def some(self, images: int) -> list[Any] | None:
        """Draw batches of about `images` training images; None without training images."""
        if self.data is None:
            return None
        batches = self.data.batches(BATCH, shuffle=True, seed=self.seed, device=self.device)
        return list(islice(batches, -(-images // BATCH)))

    def stage(self, name: str, make: Callable[[], Network], training: Training) -> Network:
        """Return the network of a stage: load a kept one, or make, train and keep a new one.

        Args:
            name: name of the stage and of its folder.
            make: returns the network to train.
            training: settings of the training.
        """
        folder = self.folder / name
        state = folder.with_suffix(".state")
        kept = self._kept(folder)
        if kept is not None:
            state.unlink(missing_ok=True)  # left by a run that stopped right after the stage
            return kept
        shutil.rmtree(folder, ignore_errors=True)  # a broken stage is made again
        start = time.time()
        self.report(name, 0, 1)
        network = make()
        model = network.model
        making = time.time() - start
        before = None if name == "trained" else self.accuracy(model)
        if training.epochs and self.data is not None:
            steps = partial(self.report, name)
            how: Any = {"seed": self.seed, "device": self.device, "state": state}
            train(model, self.data, training, progress=steps, **how)
        end = time.time()
        record = Record(
            *(name, self.part, start, end, making, training.epochs),
            images=0 if self.data is None else len(self.data),
            params=sum(parameter.numel() for parameter in model.parameters()),
            before=before,
            accuracy=self.accuracy(model),
        )
        self._keep(folder, network, record)
        state.unlink(missing_ok=True)
        return Network(model.eval(), network.plan)

    def _keep(self, folder: Path, network: Network, record: Record) -> None:
        """Save the network of a stage with the records of all stages so far."""
        stages = [asdict(each) for each in (*self.records, record)]
        save(
            folder,
            network.model,
            architecture=self.recipe.model,
            arguments=self.recipe.arguments,
            figures={
                "accuracy": record.accuracy,
                "stages": stages,
                "recipe": self.recipe.digest,
            },
            plan=network.plan,
        )
        self.records.append(record)

    def _kept(self, folder: Path) -> Network | None:
        """Load the network and the record of a finished stage; None if it is missing or broken."""
        if not folder.exists():
            return None
        model = self.resolve().model  # outside try: if this fails, the folder is not at fault
        try:
            network = load_network(folder, model)
            self.records.append(read_records(folder)[-1])
        except IntrafuseError:
            return None
        return network

    def accuracy(self, model: nn.Module) -> float | None:
        """Measure the accuracy on the test images; None without test images."""
        return None if self.test is None else accuracy(model, self.test, device=self.device)


def is_whole(folder: Path) -> bool:
    """Tell whether a stage is kept and all its files are unchanged."""
    try:
        files = Manifest.read(folder / MANIFEST).files
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (IntrafuseError, OSError):
        return False


def read_records(folder: Path) -> list[Record]:
    """Read the records of a kept stage and of those before it.

    Raises:
        IntrafuseError: the folder is broken, or is not the folder of a stage.
    """
    stages = Manifest.read(folder / MANIFEST).figures.get("stages")
    try:
        return TypeAdapter(Annotated[list[Record], Field(min_length=1)]).validate_python(stages)
    except ValueError as error:
        raise IntrafuseError("the folder holds no records of stages", value=str(folder)) from error


def load_network(folder: Path, model: nn.Module) -> Network:
    """Load the network of a kept stage into a new network of the architecture."""
    model = load(folder, model)
    plan = Plan.load(folder / PLAN) if (folder / PLAN).exists() else None
    return Network(model, plan)
