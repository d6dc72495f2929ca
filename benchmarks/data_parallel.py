"""Bytes and time of DistributedDataParallel against factorised training, over a slow link.

    .venv/bin/python benchmarks/data_parallel.py --data ../shared/data/cifar10

Two processes train VGG11-BN (a quarter of its width) by DistributedDataParallel with gloo, each in
a network namespace of its own, joined by a virtual cable that tc netem slows to 100 Mbit/s and
10 ms (where the kernel has no netem, tbf keeps the rate, without delay, and the result says so).
Bytes are read off the cable's counter. Fuse-and-prune moves recipes and networks alone; its time is
that of the workers in parallel, of so many bytes over such a link, and of fusing. Needs root and
iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import intrafuse
from intrafuse.catalog.data import load_data
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.factorize.recipe import make_recipe

SPACES = {"intrafuse-a": "10.77.0.1", "intrafuse-b": "10.77.0.2"}
RATE, DELAY = 100e6, 0.010  # bits and seconds


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def connect() -> str:
    """Make two namespaces and a slow cable between them, and tell how slow it is."""
    first, second = SPACES
    for space in SPACES:
        run("ip", "netns", "add", space)
    run("ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable",
        "netns", second)  # fmt: skip
    for space, address in SPACES.items():
        inside = ("ip", "netns", "exec", space)
        run(*inside, "ip", "address", "add", f"{address}/24", "dev", "cable")
        run(*inside, "ip", "link", "set", "cable", "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        shape = (*inside, "tc", "qdisc", "add", "dev", "cable", "root")
        try:
            run(*shape, "netem", "delay", "10ms", "rate", "100mbit")
            link = "100 Mbit/s, 10 ms"
        except subprocess.CalledProcessError:
            run(*shape, "tbf", "rate", "100mbit", "burst", "64kb", "latency", "400ms")
            link = "100 Mbit/s, no delay (this kernel has no netem)"
    return link


def disconnect() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


def moved() -> int:
    """Read the bytes that the first end of the cable has sent and received."""
    first = next(iter(SPACES))
    told = subprocess.run(
        ["ip", "-n", first, "-s", "-j", "link", "show", "cable"], capture_output=True, check=True
    )
    stats = json.loads(told.stdout)[0]["stats64"]
    return stats["tx"]["bytes"] + stats["rx"]["bytes"]


def worker(options: argparse.Namespace) -> None:
    """Train on every second batch, gradients averaged with the other process."""
    torch.set_num_threads(1)
    data = load_data(f"cifar10:{options.data}", split="train", limit=options.images)
    os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29577"}
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    dist.init_process_group("gloo", rank=options.rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(resolve_model("vgg11_bn", width=0.25).model.train())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    dist.barrier()
    started = time.perf_counter()
    for epoch in range(options.epochs):
        batches = list(data.batches(128, shuffle=True, seed=epoch))
        for images, labels in batches[options.rank :: 2][: len(batches) // 2]:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
    dist.barrier()
    if options.rank == 0:
        print(json.dumps({"seconds": time.perf_counter() - started}))
    dist.destroy_process_group()


def data_parallel(options: argparse.Namespace) -> tuple[float, int]:
    """Return seconds and bytes of data-parallel training."""
    before = moved()
    command = [sys.executable, __file__, "--data", options.data, "--images", str(options.images)]
    command += ["--epochs", str(options.epochs), "--rank"]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", space, *command, str(rank)], stdout=subprocess.PIPE
        )
        for rank, space in enumerate(SPACES)
    ]
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process of data-parallel training failed")
    return json.loads(told[0].splitlines()[-1])["seconds"], moved() - before


def factorised(options: argparse.Namespace) -> tuple[float, int]:
    """Return seconds and bytes of fuse-and-prune, with the time of the bytes on the link."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = load_data(f"cifar10:{options.data}", split="train", limit=options.images)
        files = []
        for rank in range(2):
            files.append(str(Path(folder) / f"{rank}.txt"))
            Path(files[-1]).write_text("\n".join(map(str, range(rank, len(data), 2))))
        training = {"epochs": options.epochs, "precision": "bfloat16"}
        made = make_recipe(
            {
                "scheme": "fap",
                "model": "vgg11_bn",
                "arguments": {"width": 0.25},
                "data": f"cifar10:{Path(options.data).resolve()}",
                "splits": {"scheme": "files", "files": files},
                "training": training,
                "fused": {"epochs": 0},
                "pruned": {"epochs": 0},
            }
        )
        result = intrafuse.factorize(made, Path(folder) / "run", threads=1).result
    count = result.sent + result.received
    return result.seconds + count * 8 / RATE + 2 * DELAY, count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, default=20_000, help="of the training set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        worker(options)
        return
    disconnect()
    try:
        link = connect()
        rows = {"data parallel": data_parallel(options), "factorised": factorised(options)}
    finally:
        disconnect()
    print(f"link: {link}")
    print(f"{'training':14} {'seconds':>8} {'bytes':>14}")
    for name, (seconds, count) in rows.items():
        print(f"{name:14} {seconds:8.1f} {count:14,}")
    seconds, counts = zip(*rows.values(), strict=True)
    print(f"ratio          {seconds[0] / seconds[1]:8.1f} {counts[0] / counts[1]:14.1f}")


if __name__ == "__main__":
    main()
