"""Seconds and peak memory of planning one wide group: the MLP of one layer of Llama-7B.

    .venv/bin/python benchmarks/wide.py [--methods intra-fusion,folding,moment] [--stream 4096]
        [--channels 11008] [--dtype float32] [--threads 1]

One row for each method, in a fresh process: gate_proj and up_proj (stream -> channels), their
product through SiLU, and down_proj; half of the channels go. Seconds are of the processor and of
the clock, with the trace; memory is the peak beyond the weights. Weights are random: neither
depends on them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import intrafuse


class Gated(nn.Module):
    """Channels are products of two linear maps, one through SiLU."""

    def __init__(self, stream: int, channels: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(*sizes, bias=False)
            for sizes in ((stream, channels), (stream, channels), (channels, stream))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def kilobytes(field: str) -> int:
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def measure(method: str, stream: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tiny = Gated(8, 16).to(dtype)
    intrafuse.plan(tiny, torch.randn(1, 4, 8, dtype=dtype), channels=0.5, method=method)  # imports
    model, x = Gated(stream, channels).to(dtype).eval(), torch.randn(1, 4, stream, dtype=dtype)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, clock, processor = kilobytes("VmRSS"), time.perf_counter(), time.process_time()
    intrafuse.plan(model, x, channels=0.5, method=method)
    seconds = time.process_time() - processor, time.perf_counter() - clock
    memory = (kilobytes("VmHWM") - before) / 2**20
    print(f"{method} | {seconds[0]:.1f} | {seconds[1]:.1f} | {memory:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", default="intra-fusion,folding,moment")
    parser.add_argument("--stream", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=11008)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help="in this process, without a header")
    asked = parser.parse_args()
    if asked.here:
        torch.set_num_threads(asked.threads)
        measure(asked.methods, asked.stream, asked.channels, getattr(torch, asked.dtype))
        return
    print("method | processor, s | clock, s | memory beyond the weights, GiB", flush=True)
    for method in asked.methods.split(","):
        given = [*sys.argv[1:], "--methods", method, "--here"]  # the last of two settings counts
        subprocess.run([sys.executable, __file__, *given], check=True)


if __name__ == "__main__":
    main()
