"""Prune-and-fuse and fuse-and-prune against training on all data, on CIFAR-10.

    .venv/bin/python benchmarks/factorized.py --data ../shared/data/cifar10

VGG11-BN of a quarter of its width, two disjoint halves, equal total epochs, one thread for each
worker, for the joint stages and for the whole-data run. A method's runs share what does not depend
on it (networks that are only trained, and fused before they are pruned). Everything is kept in
--out; a second call goes on, or prints the tables at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean

import torch

import intrafuse
from intrafuse.checkpoint.folder import MANIFEST
from intrafuse.study.factorize.recipe import Recipe, make_recipe, write_recipe
from intrafuse.study.factorize.result import Result
from intrafuse.study.report.kinds.factorized import timeline

METHODS = ("intra-fusion", "select", "moment")
SHARES = (0.5, 0.7)
SCHEMES = ("whole", "paf", "fap")
UNPRUNED = ("trained", "fused")  # stages that come before any pruning; `fused` for fap


def recipe(options: argparse.Namespace, scheme: str, method: str, share: float, seed: int):
    short = {"rate": 0.1, "weight_decay": 5e-4, "schedule": "one-cycle", "augment": "crop-flip"}
    short["precision"] = "bfloat16"
    tuning = {**short, "rate": 0.02, "epochs": options.finetune_epochs}
    return make_recipe(
        {
            "scheme": scheme,
            "model": "vgg11_bn",
            "arguments": {"width": options.width},
            "data": f"cifar10:{Path(options.data).resolve()}",
            "training": {**short, "epochs": options.epochs},
            "pruned": tuning,
            "fused": tuning,
            "pruning": {"channels": share, "method": method},
            "seed": seed,
        }
    )


def borrow(made: Recipe, target: Path, others: list[Path]) -> None:
    """Copy the stages that no pruning came before from an earlier run of the same networks."""
    write_recipe(made, target / "recipe.yaml")
    for other in others:
        for folder in (other, *sorted((other / "parts").glob("*"))):
            into = target / folder.relative_to(other)
            same_scheme = other.name.startswith(made.scheme) and made.scheme == "fap"
            for stage in UNPRUNED if same_scheme else UNPRUNED[:1]:
                if (folder / stage).is_dir() and not (into / stage).exists():
                    shutil.copytree(folder / stage, into / stage)
                    path = into / stage / MANIFEST
                    manifest = json.loads(path.read_text())
                    manifest["figures"].pop("recipe", None)  # it would not be taken for this one's
                    path.write_text(json.dumps(manifest))


def run(options: argparse.Namespace, *key) -> Result:
    scheme, method, share, seed = key
    made = recipe(options, *key)
    folder = options.out / f"{scheme}-{method}-{share:g}-{seed}"
    if not folder.exists():
        parts = "whole" if scheme == "whole" else "[pf]a[fp]"
        borrow(made, folder, sorted(options.out.glob(f"{parts}-*-{seed}")))
    return intrafuse.factorize(made, folder, threads=1).result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/factorized"))
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--finetune-epochs", type=int, default=2)
    parser.add_argument("--seeds", default="0,1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [1000 * int(seed) for seed in options.seeds.split(",")]
    print("| method | removed | scheme | accuracy | seconds | speed-up | bytes moved |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for method in METHODS:
        for share in SHARES:
            found = {s: [run(options, s, method, share, seed) for seed in seeds] for s in SCHEMES}
            whole = mean(result.seconds for result in found["whole"])
            for scheme, results in found.items():
                accuracies = " / ".join(f"{result.accuracy:.2f}" for result in results)
                seconds = mean(result.seconds for result in results)
                moved = mean(result.sent + result.received for result in results)
                print(
                    f"| {method} | {share:.0%} | {scheme} | {accuracies} | {seconds:.0f} "
                    f"| {whole / seconds:.2f} | {moved:,.0f} |",
                    flush=True,
                )
            shown = {scheme: results[0].record({}) for scheme, results in found.items()}
            timeline(shown).write(options.out / f"timeline-{method}-{share:g}.png")


if __name__ == "__main__":
    main()
