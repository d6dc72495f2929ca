"""Growth of planning time with the width of one group, at 50 % of its channels.

    .venv/bin/python benchmarks/width.py [--widths 512,1024,2048,4096] [--methods moment]
    .venv/bin/python benchmarks/width.py --methods "fuse ot,fuse assignment,fuse moment"

The network is linear, batch norm, ReLU, linear, all of n channels, with random weights. Prints
the seconds for trace, plan and surgery (or for fusing two such networks), the ratio to the width
before, and the ratio to one float64 matrix solve of n equations with n right-hand sides in the
same run.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import intrafuse


def network(n: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(n + seed)
    norm = nn.BatchNorm1d(n)
    nn.init.normal_(norm.bias, std=0.3)
    return nn.Sequential(nn.Linear(64, n), norm, nn.ReLU(), nn.Linear(n, n)).eval()


def solve_seconds(n: int) -> float:
    matrix = torch.randn(n, n, dtype=torch.double) + n * torch.eye(n, dtype=torch.double)
    started = time.perf_counter()
    torch.linalg.solve(matrix, matrix)
    return time.perf_counter() - started


def work(method: str, n: int) -> None:
    model, x = network(n), torch.zeros(2, 64)
    if method.startswith("fuse "):
        intrafuse.fuse([model, network(n, 1)], x, method=method.removeprefix("fuse "))
    else:
        intrafuse.prune(model, x, channels=0.5, method=method, include=["0"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", default="512,1024,2048,4096")
    parser.add_argument("--methods", default="select,intra-fusion,folding,moment,auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for method in options.methods.split(","):
        work(method, 32)  # warm up
    print(f"{'method':16} {'width':>6} {'seconds':>8} {'/ before':>9} {'/ solve':>8}")
    for method in options.methods.split(","):
        before = None
        for n in map(int, options.widths.split(",")):
            unit = solve_seconds(n)
            started = time.perf_counter()
            work(method, n)
            seconds = time.perf_counter() - started
            grown = "" if before is None else f"{seconds / before:.1f}"
            print(f"{method:16} {n:6} {seconds:8.2f} {grown:>9} {seconds / unit:8.1f}", flush=True)
            before = seconds


if __name__ == "__main__":
    main()
