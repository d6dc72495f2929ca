"""The demonstration: train on the embedded digits, prune by two methods, save and reload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from intrafuse.batches import map_tensors
from intrafuse.checkpoint import load, save
from intrafuse.data import load_data
from intrafuse.evaluate.compare import Comparison, Row, compare
from intrafuse.prune import Pruned, prune
from intrafuse.training import PRESETS, train
from intrafuse.zoo import resolve_model

__all__ = ["Demo", "run_demo"]

NETWORK, SHARES, METHODS = "digits_resnet", (0.3, 0.5, 0.7), ("select", "intra-fusion")
ARGUMENTS: dict[str, Any] = {"width": 2.0}  # wider than needed, as networks in use are
TRAINING = PRESETS["short"].model_copy(update={"epochs": 8, "batch": 64})
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        comparison: size and accuracy of each network, before fine-tuning.
        folders: where the networks were saved; the unpruned one first.
        reloaded: the folder that was loaded again.
        identical: whether the outputs of that network are the same bit for bit.
    """

    comparison: Comparison
    folders: tuple[Path, ...]
    reloaded: Path
    identical: bool


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    epochs: int = TRAINING.epochs,
    shares: Sequence[float] = SHARES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Demo:
    """Train a small network on the digits, prune it by selection and by fusion, and save all.

    Args:
        out: folder for one folder of each network.
        seed: of weights and order of images.
        epochs: of training.
        shares: of channels to remove.
        device: where to compute.
        progress: called with (what, done, total).

    Raises:
        IntrafuseError: a folder cannot be written.
    """
    report = progress or (lambda what, done, total: None)
    images, test = (load_data("digits", split=split) for split in ("train", "test"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = resolve_model(NETWORK, **ARGUMENTS)
        settings = TRAINING.model_copy(update={"epochs": epochs})
        steps = partial(report, "training")
        train(network.model, images, settings, seed=seed, device=device, progress=steps)
    example = map_tensors(lambda tensor: tensor.to(device), network.example_inputs)
    out = Path(out)
    keeping = partial(save, architecture=NETWORK, arguments=ARGUMENTS)
    folders: list[Path] = [keeping(out / "original", network.model)]
    last: list[Pruned] = []

    def keep(row: Row, pruned: Pruned) -> None:
        share = next(iter(pruned.report.wanted.values()))
        folder = out / f"{row.method}-{share:g}"
        folders.append(keeping(folder, pruned, figures={"accuracy": row.accuracy}))
        last[:] = [pruned]

    comparison = compare(
        network.model,
        example,
        test,
        channels=shares,
        methods=METHODS,
        device=device,
        keep=keep,
        prune=partial(prune, seed=seed),
        progress=partial(report, "pruning"),
    )
    some = test.unlabelled(64, seed=seed).to(device)
    with torch.inference_mode():
        again = load(folders[-1]).to(device)(some)
        same = torch.equal(again, last[0].model.eval()(some))
    return Demo(comparison, tuple(folders), folders[-1], same)
