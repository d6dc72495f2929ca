"""Budgets of latency: what was asked for, predicted and measured.

    .venv/bin/python benchmarks/latency.py --networks resnet20,vgg11_bn,resnet18

Prints a markdown table. Networks have random weights, on which the time of a call does not depend.
Before and after are timed in turns, so the shares compare networks under the same conditions.
"""

from __future__ import annotations

import argparse
import time

import torch

import intrafuse
from intrafuse.catalog.zoo import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="resnet20,vgg11_bn,resnet18")
    parser.add_argument("--shares", default="0.3,0.5,0.7")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| network | scope | asked | predicted | measured | channels | ms before | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.networks.split(","):
        net = resolve_model(name)
        x = net.example_inputs[0].expand(options.batch, -1, -1, -1).contiguous()
        for share in map(float, options.shares.split(",")):
            for scope in ("uniform", "global"):
                row = _row(net.model, x, share, scope)
                print(f"| {name} | {scope} | {share:.0%} | {row} |", flush=True)


def _row(model: torch.nn.Module, x: torch.Tensor, share: float, scope: str) -> str:
    started = time.perf_counter()
    try:
        found = intrafuse.prune(model, x, latency=share, method="select", scope=scope)  # type: ignore[arg-type]
    except intrafuse.IntrafuseError as error:
        return f"{error} | | | | "
    seconds = time.perf_counter() - started
    told, took = found.plan.settings["latency"], found.report.latency
    predicted = 1 - told["after"] / told["before"]
    measured = 1 - took["after"].median / took["before"].median
    channels = found.report.reached["channels"]
    before = took["before"].median
    return f"{predicted:.1%} | {measured:.1%} | {channels:.1%} | {before:.2f} | {seconds:.1f}"


if __name__ == "__main__":
    main()
