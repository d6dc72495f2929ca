"""Train pairs of networks on CIFAR-10 for the other benchmarks, and keep them in a folder.

    .venv/bin/python benchmarks/pairs.py --data ../shared/data/cifar10

For each architecture four networks from different starts: two on all images, one on each half.
They are written to benchmarks/cache (not part of the repository: 40 MB for each vgg11_bn), where a
second call finds them. A training that was stopped goes on from its last epoch. About 90 minutes
on one core; two calls with different --networks share two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from intrafuse.catalog.data import Images, load_data
from intrafuse.catalog.zoo import ResolvedModel, load_weights, resolve_model
from intrafuse.study.evaluate import accuracy
from intrafuse.study.training import PRESETS, train

CACHE = Path(__file__).parent / "cache"
ARGUMENTS: dict[str, dict] = {
    "mlp": {"in_channels": 3, "image_size": 32, "hidden": (512, 256, 128)},
    "resnet20": {},
    "vgg11_bn": {},
}
EPOCHS = {"mlp": 20, "resnet20": 10, "vgg11_bn": 6}
PAIRS = {"all data": ("all-0", "all-1"), "halves": ("half-0", "half-1")}
NAMES = [name for pair in PAIRS.values() for name in pair]


def network(architecture: str, name: str) -> ResolvedModel:
    """Load a trained network from the cache."""
    found = resolve_model(architecture, **ARGUMENTS[architecture])
    load_weights(found.model, CACHE / f"{architecture}-{name}.safetensors")
    return found


def part(data: Images, name: str) -> Images:
    """Give the images that a network is trained on."""
    kind, number = name.split("-")
    if kind == "all":
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.subset(order.chunk(2)[int(number)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--networks", default=",".join(ARGUMENTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, test = (load_data(f"cifar10:{options.data}", split=s) for s in ("train", "test"))
    for architecture in options.networks.split(","):
        for seed, name in enumerate(NAMES):
            path = CACHE / f"{architecture}-{name}.safetensors"
            if path.exists():
                continue
            torch.manual_seed(seed)
            model = resolve_model(architecture, **ARGUMENTS[architecture]).model
            settings = PRESETS["short"].model_copy(
                update={"epochs": EPOCHS[architecture], "precision": "bfloat16"}
            )
            started = time.perf_counter()
            state = path.with_suffix(".state")
            train(model, part(data, name), settings, seed=seed, state=state)
            seconds = time.perf_counter() - started
            save_file(model.state_dict(), path)
            state.unlink()
            print(
                f"{architecture} {name}: {accuracy(model, test):.2f} %, {seconds:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
