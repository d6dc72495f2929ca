"""Time and memory of planning and surgery for whole networks, at 50 % of channels.

    .venv/bin/python benchmarks/planning.py [--threads 2] [--repeats 5]

Prints, for each network and method, the median time after import (trace, plan and surgery) as a
ratio to one forward pass of 100 images in the same run, and the peak extra memory as a multiple
of the model's own size. Weights are random: neither depends on their values.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch

import intrafuse
from intrafuse.catalog.zoo import resolve_model

NETWORKS = ("vgg11_bn", "resnet18", "resnet56")
METHODS = ("select", "intra-fusion", "folding")


def forward_seconds(model: torch.nn.Module, shape: tuple[int, ...]) -> float:
    x = torch.randn(100, *shape[1:])
    with torch.inference_mode():
        model(x)
        started = time.perf_counter()
        model(x)
    return time.perf_counter() - started


def peak_extra(network: str, method: str, threads: int) -> float:
    """Measure, in a fresh process, how far planning raises the peak of resident memory."""
    code = f"""
import pathlib, re, torch, intrafuse
from intrafuse.catalog.zoo import resolve_model

def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+)", text)[1])

torch.set_num_threads({threads})
tiny = resolve_model("mlp")
intrafuse.prune(tiny.model, tiny.example_inputs, channels=0.5, method={method!r})
big = resolve_model({network!r})
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
pruned = intrafuse.prune(big.model, big.example_inputs, channels=0.5, method={method!r})
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    tiny = resolve_model("mlp")
    intrafuse.prune(tiny.model, tiny.example_inputs, channels=0.5)
    first = time.perf_counter() - started
    print(f"{options.threads} threads; first call in the process (an MLP): {first:.2f} s")
    header = ("network", "method", "seconds", "/ forward of 100", "memory / model")
    print("{:10} {:14} {:>8} {:>17} {:>15}".format(*header))
    for network in NETWORKS:
        resolved = resolve_model(network)
        size = sum(t.nbytes for t in resolved.model.state_dict().values())
        unit = forward_seconds(resolved.model, tuple(resolved.example_inputs[0].shape))
        for method in METHODS:
            times = []
            for _ in range(options.repeats):
                started = time.perf_counter()
                intrafuse.prune(
                    resolved.model, resolved.example_inputs, channels=0.5, method=method
                )
                times.append(time.perf_counter() - started)
            seconds = statistics.median(times)
            memory = peak_extra(network, method, options.threads) / size
            print(f"{network:10} {method:14} {seconds:8.2f} {seconds / unit:17.2f} {memory:15.2f}")


if __name__ == "__main__":
    main()
