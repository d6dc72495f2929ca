"""One group at a time: accuracy of every method on each group of a ResNet of the zoo, alone.

    .venv/bin/python benchmarks/groups.py --network resnet18 \\
        --weights ../shared/models/resnet18_cifar10.safetensors --data ../shared/data/cifar10

Prints a markdown table with a row for each group and method, 10 to 70 % of its channels removed,
and names the cells where a method falls behind `select`, or behind `intra-fusion` by more than
0.3 points. Nothing is fine-tuned. Blocks before the pruned group compute what they did, so their
outputs are computed once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model

BATCH = 250


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    stages = {name: getattr(model, name) for name in model.stages}
    return {f"{name}.{i}": block for name, stage in stages.items() for i, block in enumerate(stage)}


def stem(model: nn.Module, images: Tensor) -> Tensor:
    return torch.relu(model.bn1(model.conv1(images)))


class Tail:
    """Accuracy of networks that agree with an original up to some block."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in blocks_of(model)}
        for part in images.split(BATCH):
            x = stem(model, part)
            for name, block in blocks_of(model).items():
                self.inputs[name].append(x)
                x = block(x)

    def accuracy(self, model: nn.Module, group: str | None) -> float:
        """Run a network from the block that holds a group of channels (None: from the start)."""
        names = list(blocks_of(model))
        start = next((n for n in names if group is not None and group.startswith(f"{n}.")), None)
        rest = names[names.index(start) :] if start else names
        right = 0
        for i, (part, labels) in enumerate(
            zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True)
        ):
            x = self.inputs[start][i] if start else stem(model, part)
            for name in rest:
                x = blocks_of(model)[name](x)
            logits = model.linear(adaptive_avg_pool2d(x, 1).flatten(1))
            right += int((logits.argmax(1) == labels).sum())
        return 100 * right / len(self.labels)


def load_images(folder: str, limit: int) -> tuple[Tensor, Tensor]:
    parts = list(load_data(f"cifar10:{folder}", limit=limit).batches(BATCH))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def behind(found: dict[str, list[float]]) -> list[str]:
    """Name the cells of a group where a method loses to select or to intra-fusion."""
    words = []
    for method, cells in found.items():
        if method in ("select", "intra-fusion"):
            continue
        for rival, slack in (("select", 0.0), ("intra-fusion", 0.3)):
            for i, (own, other) in enumerate(zip(cells, found[rival], strict=True)):
                if own < other - slack - 1e-9:
                    words.append(f"{method} at {10 * (i + 1)} %: {own:.2f} ({rival} {other:.2f})")
    return words


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--methods", default="select,intra-fusion,moment,auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = resolve_model(options.network)
    model = network.model.eval()
    load_weights(model, options.weights)
    tail = Tail(model, *load_images(options.data, options.images))
    shares = [i / 10 for i in range(1, 8)]
    print(f"Unpruned {tail.accuracy(model, None):.2f}, {options.images} test images.\n")
    print("| group | method | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
    print("|---|---|" + "---|" * len(shares), flush=True)
    losses = []
    for group in intrafuse.trace(model, network.example_inputs).groups:
        found = {}
        for method in options.methods.split(","):
            found[method] = []
            for share in shares:
                pruned = intrafuse.prune(
                    model, network.example_inputs, channels=share, method=method,
                    include=[group.name],
                )  # fmt: skip
                found[method].append(tail.accuracy(pruned.model, group.name))
            cells = " | ".join(f"{value:.2f}" for value in found[method])
            print(f"| {group.name} | `{method}` | {cells} |", flush=True)
        losses += [f"{group.name}: {words}" for words in behind(found)]
    print("\nBehind: " + ("; ".join(losses) or "nowhere"))


if __name__ == "__main__":
    main()
