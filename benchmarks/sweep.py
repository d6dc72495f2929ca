"""Time of planning by depth: twice the depth should take twice the time.

    python benchmarks/sweep.py [--threads 1] [--deepest 64] [--json FILE]

Rows are networks of equal layers, whose groups are all halved, and methods that compute moments.
Times are seconds of the processor, without the trace. `growth` is the time of the deepest network
over that of the one a quarter as deep, divided by four: 1 is proportional, 4 is quadratic.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from architectures import import_torchvision
from torch import Tensor, nn

import intrafuse
from intrafuse.methods.auto import Auto
from intrafuse.methods.method import Method
from intrafuse.methods.moment import Moment
from intrafuse.pruning import prune
from intrafuse.pruning.each_group import merge_groups

METHODS: dict[str, Callable[[], Method]] = {
    "moment": Moment,
    "moment, calibration": lambda: Moment(source="calibration"),
    "auto": Auto,
}
WIDTH = 32


def convolutions(depth: int) -> tuple[nn.Module, list[Tensor]]:
    """Make a chain of convolutions with batch norm."""
    torch.manual_seed(0)
    sizes = [3, *[WIDTH] * depth]
    layers = [
        part
        for n, m in pairwise(sizes)
        for part in (nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight
            )  # the default dies out: denormal numbers are slow
    return model.eval(), [torch.randn(16, 3, 16, 16) for _ in range(4)]


def llama(depth: int) -> tuple[nn.Module, list[Tensor]]:
    """Make a small Llama; its stream stays, so groups are MLP units, heads and widths."""
    import_torchvision()  # transformers imports it
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=depth, vocab_size=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model, [torch.randint(0, 256, (4, 32)) for _ in range(4)]


NETWORKS = {"convolutions": convolutions, "Llama layers": llama}


def seconds(network: str, depth: int, method: str) -> float:
    """Time the maps of all groups of one network."""
    model, data = NETWORKS[network](depth)
    took = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal took
        start = time.process_time()
        maps = merge_groups(*args, **kwargs)
        took = time.process_time() - start
        return maps

    with mock.patch.object(prune, "merge_groups", timed):
        intrafuse.plan(model, data[0], channels=0.5, method=METHODS[method](), data=data)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deepest", type=int, default=64)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    depths = [asked.deepest >> k for k in (3, 2, 1, 0)]
    rows = []
    print("network", "method", *depths, "growth", sep=" | ")
    for network in asked.networks.split(","):
        seconds(network, 2, "auto")  # imports
        for method in METHODS:
            times = [seconds(network, depth, method) for depth in depths]
            growth = times[-1] / times[1] / 4
            rows.append({"network": network, "method": method, "seconds": times, "growth": growth})
            cells = (f"{t:.2f}" for t in times)
            print(network, method, *cells, f"{growth:.2f}", sep=" | ", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps({"depths": depths, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
