"""Accuracy of a pruned network that is fused with the network that it was pruned from.

    .venv/bin/python benchmarks/recovery.py --models ../shared/models --data ../shared/data/cifar10

The recovery experiment of Singh and Jaggi (NeurIPS 2020, section 5.4): `select` removes channels
from every group, the result is fused with the original at its own widths, both counting alike, and
no data is used but in the columns "re-estimated" (500 unlabelled training images). The rows
"pruned by moments" show what moments reach from the original alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.study.evaluate import accuracy

SHARES = (0.3, 0.5, 0.7)
WAYS = {
    "fused, OT by weights": {"method": "ot"},
    "fused, OT by activations": {"method": "ot", "features": "activations"},
    "fused, moment": {"method": "moment"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--networks", default="vgg11_bn,resnet18")
    parser.add_argument("--images", type=int, default=None, help="of the test set; default all")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    test = load_data(f"cifar10:{options.data}", limit=options.images)
    some = load_data(f"cifar10:{options.data}", split="train", limit=2000).unlabelled(500, seed=0)
    batches = list(some.split(100))

    def figures(models: list[nn.Module]) -> str:
        return " / ".join(f"{accuracy(model, test):.2f}" for model in models)

    for name in options.networks.split(","):
        net = resolve_model(name)
        load_weights(net.model, options.models / f"{name}_cifar10.safetensors")
        x = net.example_inputs
        print(f"\n{name}, {accuracy(net.model, test):.2f} %, removed 30 / 50 / 70 %\n")
        print("| network | accuracy | re-estimated |\n|---|---|---|", flush=True)
        rows = {}
        for title, method in (("pruned by select", "select"), ("pruned by moments", "moment")):
            rows[title] = [
                [
                    intrafuse.prune(
                        net.model, x, channels=share, method=method, data=batches, repair=repair
                    ).model
                    for share in SHARES
                ]
                for repair in (None, "batchnorm")
            ]
            print(f"| {title} | " + " | ".join(map(figures, rows[title])) + " |", flush=True)
        for title, how in WAYS.items():
            fused = [
                [
                    intrafuse.fuse([small, net.model], x, data=batches, repair=repair, **how).model
                    for small in rows["pruned by select"][0]
                ]
                for repair in (None, "batchnorm")
            ]
            print(f"| {title} | " + " | ".join(map(figures, fused)) + " |", flush=True)


if __name__ == "__main__":
    main()
