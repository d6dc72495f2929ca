"""Accuracy without fine-tuning of every method on trained CIFAR-10 networks.

    .venv/bin/python benchmarks/accuracy.py --models ../shared/models --data ../shared/data/cifar10

Prints one row for each network and method: accuracy on all test images at 30, 50 and 70 % of
channels removed from every group, and the seconds for planning and surgery. Only the row "256
images" sees data, unlabelled training images. `--rows` chooses some of the rows by number, from 0;
`--inner` prunes the first convolution of each residual block only. With `--predicted` the widths
follow predicted damage instead, and the columns are shares of parameters and of MACs; the MACs
that are left stand beside.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.methods import Moment
from intrafuse.study.evaluate import accuracy

ROWS: dict[str, dict] = {
    "select": {"method": "select"},
    "intra-fusion": {"method": "intra-fusion"},
    "folding": {"method": "folding"},
    "moment, selected": {"method": Moment(transport="none")},
    "moment, OT transport": {"method": Moment(transport="intra-fusion")},
    "moment": {"method": "moment"},
    "auto": {"method": "auto"},
    "moment, synthetic": {"method": Moment(source="synthetic")},
    "moment, synthetic repair": {"method": "moment", "repair": "synthetic"},
    "moment, 256 images": {"method": Moment(source="calibration")},
}
EQUAL = [{"channels": share} for share in (0.3, 0.5, 0.7)]
PREDICTED = [{"params": 0.75}, {"params": 0.9}, {"macs": 0.5}, {"macs": 0.7}]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--models", type=Path, required=True, help="folder of *_cifar10.safetensors"
    )
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--networks", default="vgg11_bn,resnet18")
    parser.add_argument("--rows", default=",".join(str(i) for i in range(len(ROWS))))
    parser.add_argument("--inner", action="store_true")
    parser.add_argument("--predicted", action="store_true")
    parser.add_argument("--images", type=int, default=None, help="of the test set; default all")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    test = load_data(f"cifar10:{options.data}", limit=options.images)
    some = load_data(f"cifar10:{options.data}", split="train", limit=1024).unlabelled(256, seed=0)
    rows = [list(ROWS.items())[int(i)] for i in options.rows.split(",")]
    common = {"include": ["layer?.*.conv1"]} if options.inner else {}
    if options.predicted:
        common["scope"] = "predicted"
    for name in options.networks.split(","):
        network = resolve_model(name)
        load_weights(network.model, options.models / f"{name}_cifar10.safetensors")
        for title, settings in rows:
            kept, seconds, macs = [], [], []
            for budget in PREDICTED if options.predicted else EQUAL:
                started = time.perf_counter()
                pruned = intrafuse.prune(
                    network.model, network.example_inputs, data=list(some.split(64)),
                    **budget, **common, **settings,
                )  # fmt: skip
                seconds.append(time.perf_counter() - started)
                kept.append(accuracy(pruned.model, test))
                macs.append(pruned.report.after.macs / 1e6)
            figures = " ".join(f"{value:6.2f}" for value in kept)
            left = "  MACs left " + " / ".join(f"{value:.1f} M" for value in macs)
            times = " / ".join(f"{value:.1f}" for value in seconds)
            print(f"{name:10} {title:25} {figures}   {times} s{left}", flush=True)


if __name__ == "__main__":
    main()
