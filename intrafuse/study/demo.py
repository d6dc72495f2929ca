"""The demo: train on the embedded digits, prune by four methods, save, reload and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafuse.catalog.data import Images, load_data
from intrafuse.catalog.zoo import ResolvedModel, resolve_model
from intrafuse.checkpoint.folder import load, save
from intrafuse.pruning.result import Pruned
from intrafuse.pruning.settings import Settings
from intrafuse.study.evaluate.compare import Comparison, Row, compare
from intrafuse.study.evaluate.cost import costs, costs_record
from intrafuse.study.evaluate.divergences import divergences
from intrafuse.study.evaluate.landscape import landscape
from intrafuse.study.evaluate.sensitivity import sensitivity
from intrafuse.study.report.page import write_report
from intrafuse.study.report.record import as_record, write_record
from intrafuse.study.training import PRESETS, train
from intrafuse.support.batches import map_tensors
from intrafuse.support.files import folder_target

__all__ = ["Demo", "run_demo"]

NETWORK, SHARES = "digits_resnet", (0.3, 0.5, 0.7)
METHODS = ("select", "intra-fusion", "folding", "moment")
PAIR = ("select", "moment")  # methods that landscape and sensitivity compare
POINTS = 6  # points of the landscape's grid in each direction
ARGUMENTS: dict[str, Any] = {"width": 2.0}  # wider than needed, like networks in practice
TRAINING = PRESETS["short"].model_copy(update={"epochs": 8, "batch": 64})
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """Results of the demo.

    Attributes:
        comparison: size and accuracy of each network, before fine-tuning.
        folders: folders of the saved networks; the unpruned one first.
        reloaded: the folder of the reloaded network.
        identical: whether the reloaded network's outputs are bit-identical.
        report: the report page; None if the extra `plots` is not installed.
    """

    comparison: Comparison
    folders: tuple[Path, ...]
    reloaded: Path
    identical: bool
    report: Path | None


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    epochs: int = TRAINING.epochs,
    shares: Sequence[float] = SHARES,
    points: int = POINTS,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Demo:
    """Train a small network on the digits, prune it by four methods, and save all networks.

    Args:
        out: folder that holds a folder for each network.
        seed: seeds the weights and the order of images.
        epochs: number of training epochs.
        shares: shares of channels to remove.
        points: points of the landscape's grid in each direction.
        device: device to compute on.
        progress: called with (name of the work, done, total).

    Raises:
        IntrafuseError: a folder cannot be written.
    """
    report = progress or (lambda what, done, total: None)
    folder_target(out)  # refuse a bad folder before training
    network = _trained(seed, epochs, device, partial(report, "training"))
    test = load_data("digits")
    example = map_tensors(lambda tensor: tensor.to(device), network.example_inputs)
    out = Path(out)
    keeping = partial(save, architecture=NETWORK, arguments=ARGUMENTS)
    folders: list[Path] = [keeping(out / "original", network.model)]
    kept: dict[str, Pruned] = {}

    def keep(row: Row, pruned: Pruned) -> None:
        share = next(iter(pruned.report.wanted.values()))
        folder = out / f"{row.method}-{share:g}"
        folders.append(keeping(folder, pruned, figures={"accuracy": row.accuracy}))
        kept[folder.name] = pruned

    comparison = compare(
        network.model,
        example,
        test,
        channels=shares,
        methods=METHODS,
        device=device,
        keep=keep,
        settings=Settings(seed=seed),
        progress=partial(report, "pruning"),
    )
    some = test.unlabelled(64, seed=seed).to(device)
    with torch.inference_mode():
        again = load(folders[-1]).to(device)(some)
        same = torch.equal(again, kept[folders[-1].name].model.eval()(some))
    study = _Study(network.model, example, test, device, report)
    records = {"comparison": comparison.as_data(), **study.measure(shares, kept, points)}
    page = None
    for kind, record in records.items():
        facts = {"model": NETWORK, "data": "digits", "images": len(test)}
        found = as_record(kind, {**facts, **record}, command=f"intrafuse demo --seed {seed}")
        write_record(out / f"{kind}.json", found)
    if find_spec("matplotlib") is not None and find_spec("jinja2") is not None:
        page = write_report([out], out / "report.html", title="intrafuse demo")
    return Demo(comparison, tuple(folders), folders[-1], same, page)


def _trained(
    seed: int, epochs: int, device: str, progress: Callable[[int, int], None]
) -> ResolvedModel:
    """Train the network, and restore the random state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = resolve_model(NETWORK, **ARGUMENTS)
        settings = TRAINING.model_copy(update={"epochs": epochs})
        images = load_data("digits", split="train")
        train(network.model, images, settings, seed=seed, device=device, progress=progress)
    return network


@dataclass(frozen=True)
class _Study:
    """The analyses of the network and its pruned versions."""

    model: nn.Module
    example_inputs: tuple[Any, ...]
    test: Images
    device: str
    report: Progress

    def measure(
        self, shares: Sequence[float], kept: Mapping[str, Pruned], points: int
    ) -> dict[str, dict[str, Any]]:
        """Measure divergence, landscape, sensitivity and cost; return a record of each kind."""
        middle = shares[len(shares) // 2]
        common: Any = {"device": self.device}
        network = (self.model, self.example_inputs, self.test)
        networks = {f"{method}-{middle:g}": kept[f"{method}-{middle:g}"] for method in METHODS}
        plans = {method: networks[f"{method}-{middle:g}"].plan for method in PAIR}
        apart = divergences(
            *network,
            channels=shares,
            methods=METHODS,
            layers=True,
            prune=lambda model, inputs, asked, data: kept[
                f"{asked.method.name}-{asked.channels:g}"
            ],
            progress=partial(self.report, "divergence"),
            **common,
        )
        plane = landscape(
            self.model,
            plans,
            self.test,
            points=points,
            progress=partial(self.report, "landscape"),
            **common,
        )
        alone = sensitivity(
            *network,
            shares=(middle,),
            methods=PAIR,
            progress=partial(self.report, "sensitivity"),
            **common,
        )
        models = {NETWORK: self.model, **{name: one.model for name, one in networks.items()}}
        return {
            "divergence": apart.as_data(),
            "landscape": {"channels_removed": middle, **plane.as_data()},
            "sensitivity": alone.as_data(),
            "cost": costs_record(costs(models, self.example_inputs), self.example_inputs),
        }
