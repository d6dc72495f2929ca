"""Accuracy of two CIFAR-10 networks fused into one, without fine-tuning.

    .venv/bin/python benchmarks/pairs.py --data ../shared/data/cifar10     # once: trains them
    .venv/bin/python benchmarks/fusion.py --data ../shared/data/cifar10

For pairs from different starts, trained on all data or each on one half: each network, the
ensemble of their outputs (an upper bound), their plain average, and every way to fuse, before and
after the statistics of all layers are estimated anew on 500 unlabelled training images. Plain
averages are re-estimated by torch.optim.swa_utils.update_bn. Activations are compared on 200
of the images.
"""

from __future__ import annotations

import argparse
import time

import torch
from pairs import ARGUMENTS, PAIRS, network
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import intrafuse
from intrafuse.catalog.data import Images, load_data
from intrafuse.study.evaluate import accuracy

WAYS: dict[str, dict] = {
    "OT, weights": {"method": "ot"},
    "OT, activations": {"method": "ot", "features": "activations"},
    "assignment, weights": {"method": "assignment"},
    "assignment, activations": {"method": "assignment", "features": "activations"},
    "moment, weights": {"method": "moment"},
    "moment, activations": {"method": "moment", "features": "activations"},
}


class Ensemble(nn.Module):
    """The mean of several networks' class probabilities."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x).softmax(1) for network in self.networks]).mean(0)


def plain(a: nn.Module, b: nn.Module, batches: list[Tensor] | None) -> nn.Module:
    """Average parameters and statistics in the order in which they stand."""
    mean = AveragedModel(a, use_buffers=True)
    mean.update_parameters(a)
    mean.update_parameters(b)
    if batches is not None:
        update_bn(batches, mean)
    return mean.eval()


def table(architecture: str, pair: tuple[str, str], some: Tensor, test: Images) -> None:
    """Print the rows of one pair."""
    a, b = (network(architecture, name) for name in pair)
    batches = list(some.split(100))

    def row(title: str, *figures: object) -> None:
        print(f"| {title} | " + " | ".join(map(str, figures)) + " |", flush=True)

    for title, model in zip(("first", "second"), (a.model, b.model), strict=True):
        row(title, f"{accuracy(model, test):.2f}", "", "")
    row("ensemble", f"{accuracy(Ensemble(a.model, b.model), test):.2f}", "", "")
    means = (plain(a.model, b.model, given) for given in (None, batches))
    row("plain average", *(f"{accuracy(model, test):.2f}" for model in means), "")
    for title, how in WAYS.items():
        found, seconds = [], 0.0
        for repair in (None, "batchnorm"):
            started = time.perf_counter()
            fused = intrafuse.fuse(
                [a.model, b.model], a.example_inputs, data=batches, repair=repair, **how
            )
            seconds = seconds or time.perf_counter() - started
            found.append(f"{accuracy(fused.model, test):.2f}")
        row(title, *found, f"{seconds:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--networks", default=",".join(ARGUMENTS))
    parser.add_argument("--images", type=int, default=None, help="of the test set; default all")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    test = load_data(f"cifar10:{options.data}", limit=options.images)
    some = load_data(f"cifar10:{options.data}", split="train", limit=2000).unlabelled(500, seed=0)
    for architecture in options.networks.split(","):
        for title, pair in PAIRS.items():
            print(f"\n{architecture}, {title}\n\n| network | accuracy | re-estimated | seconds |")
            print("|---|---|---|---|", flush=True)
            table(architecture, pair, some, test)


if __name__ == "__main__":
    main()
