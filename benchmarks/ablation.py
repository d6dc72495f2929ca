"""Does a setting of Intra-Fusion matter? Every group alone, over several networks, and a test.

    .venv/bin/python benchmarks/ablation.py --models ../shared/models --data ../shared/data/cifar10

Prints a markdown table: mean accuracy under each setting, over networks, groups and shares, and the
Kruskal-Wallis test of each set of settings (Theus et al., section 5.3, appendices C.3 and C.4).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch

from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import load_weights, resolve_model
from intrafuse.study.evaluate.ablation import SETTINGS, Ablation, ablation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", default="resnet20,vgg11_bn")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--shares", default="0.3,0.5,0.7")
    parser.add_argument("--limit", type=int, default=500, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(f"cifar10:{options.data}", limit=options.limit)
    shares = [float(share) for share in options.shares.split(",")]
    print("| set | settings: mean accuracy | networks | H | p |\n|---|---|---|---|---|", flush=True)
    for name in options.settings.split(","):
        found = []
        for network in options.networks.split(","):
            resolved = resolve_model(network)
            load_weights(resolved.model, options.models / f"{network}_cifar10.safetensors")
            arguments = (resolved.model, resolved.example_inputs, data, SETTINGS[name])
            found.append(ablation(*arguments, shares=shares))
        pooled = Ablation.pooled(found)
        told = ", ".join(f"{n} {mean(values):.2f}" for n, values in pooled.accuracies.items())
        count = len(next(iter(pooled.accuracies.values())))
        statistic = f"{pooled.statistic:.2f} | {pooled.p_value:.3f}"
        print(f"| {name} | {told} | {count} | {statistic} |", flush=True)


if __name__ == "__main__":
    main()
