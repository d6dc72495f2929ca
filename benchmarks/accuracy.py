"""Accuracy without fine-tuning of every method on trained CIFAR-10 networks.

    .venv/bin/python benchmarks/accuracy.py --models ../shared/models --data ../shared/data/cifar10

Prints one row for each network and method: accuracy on all test images at 30, 50 and 70 % of
channels removed from every group, and the seconds for planning and surgery at 50 %. The last row
of each network calibrates on 256 unlabelled training images; no other row sees data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import intrafuse
from intrafuse.data import load_data
from intrafuse.evaluate import accuracy
from intrafuse.methods import Folding, IntraFusion, Moment, Select
from intrafuse.zoo import load_weights, resolve_model

ROWS = {
    "select": Select(),
    "intra-fusion": IntraFusion(),
    "folding": Folding(),
    "moment, selected": Moment(transport="none"),
    "moment, OT transport": Moment(transport="intra-fusion"),
    "moment": Moment(),
    "moment, 256 images": Moment(source="calibration"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", type=Path, required=True, help="folder of *_cifar10.safetensors"
    )
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--networks", default="vgg11_bn,resnet18")
    parser.add_argument("--rows", default=",".join(str(i) for i in range(len(ROWS))))
    parser.add_argument("--shares", default="0.3,0.5,0.7")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    test = load_data(f"cifar10:{options.data}")
    some = load_data(f"cifar10:{options.data}", split="train", limit=1024).unlabelled(256, seed=0)
    shares = [float(share) for share in options.shares.split(",")]
    rows = [list(ROWS.items())[int(i)] for i in options.rows.split(",")]
    for name in options.networks.split(","):
        network = resolve_model(name)
        load_weights(network.model, options.models / f"{name}_cifar10.safetensors")
        for title, method in rows:
            kept, seconds = [], []
            for share in shares:
                started = time.perf_counter()
                pruned = intrafuse.prune(
                    network.model, network.example_inputs, channels=share, method=method,
                    data=list(some.split(64)),
                )  # fmt: skip
                seconds.append(time.perf_counter() - started)
                kept.append(accuracy(pruned.model, test))
            figures = " ".join(f"{value:6.2f}" for value in kept)
            times = " / ".join(f"{value:.1f}" for value in seconds)
            print(f"{name:10} {title:22} {figures}   {times} s", flush=True)


if __name__ == "__main__":
    main()
