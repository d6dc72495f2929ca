"""Prune a checkpoint by streaming, and measure time and peak resident memory.

A random checkpoint of Llama's architecture is written in bfloat16 shards; then a child process
prunes it by `prune_checkpoint`, and tells its own peak. By default the checkpoint is small.

    python benchmarks/stream.py
    python benchmarks/stream.py --llama7b --folder /work/checkpoint
    python benchmarks/stream.py --kill   # killed when half of the groups are merged, and continued

`--llama7b` needs 13.5 GB for the checkpoint and about as much again for the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from architectures import import_torchvision

import_torchvision()

import transformers  # noqa: E402 - after torchvision

from intrafuse import prune_checkpoint  # noqa: E402
from intrafuse.catalog.zoo.hub import empty_from_folder  # noqa: E402
from intrafuse.checkpoint.stored import INDEX, bytes_of, write_tensors  # noqa: E402

LLAMA7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
SMALL = {
    "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
EXCLUDED = ["*#width"]  # no configuration can say which rotary frequencies are kept


class Drawn:
    """A handle of random numbers, drawn when they are written."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self.seed, self.dtype = shape, seed, torch.bfloat16

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def load(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.empty(self.shape, dtype=self.dtype).normal_(0, 0.02, generator=generator)


def write_checkpoint(folder: Path, sizes: dict[str, int], most: int) -> int:
    """Write a random checkpoint in shards; return its bytes."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(**sizes)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    model, _ = empty_from_folder(folder)
    named = enumerate(model.named_parameters())
    drawn = {name: Drawn(tuple(p.shape), seed) for seed, (name, p) in named}
    parts: list[dict[str, Drawn]] = [{}]
    for name, handle in drawn.items():
        if sum(map(bytes_of, parts[-1].values())) + bytes_of(handle) > most:
            parts.append({})
        parts[-1][name] = handle
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    total = sum(map(bytes_of, drawn.values()))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    (folder / INDEX).write_text(text)
    return total


def prune(folder: Path, out: Path, method: str, share: float, kill: bool) -> None:
    """Prune in this process, and print figures as JSON; or be killed half way."""
    torch.set_num_threads(1)
    steps: dict[str, float] = {}
    started = time.perf_counter()

    def progress(step: str, done: int, total: int) -> None:
        steps[step] = time.perf_counter() - started
        print(f"{step} {done} of {total}, {steps[step]:.0f} s, {peak():.2f} GB", file=sys.stderr)
        if kill and step == "merging" and done == total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    made = prune_checkpoint(
        folder, out, channels=share, method=method, exclude=EXCLUDED, progress=progress
    )
    files = json.loads((out / "intrafuse.json").read_text())["files"]
    shards = "".join(files[name] for name in sorted(files) if name.startswith("model"))
    figures = {"seconds": made.seconds, "peak_gb": peak(), "until": steps}
    figures["sha256"] = hashlib.sha256(shards.encode()).hexdigest()[:16]
    print(json.dumps({**figures, "removed": made.removed, "pretrained": made.pretrained}))


def peak() -> float:
    """Return the peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama7b", action="store_true", help="sizes of Llama-2-7B")
    parser.add_argument("--folder", type=Path, help="where to write; removed at the end")
    parser.add_argument("--method", default="select")
    parser.add_argument("--share", type=float, default=0.5, help="channels to remove")
    parser.add_argument("--kill", action="store_true", help="kill it half way, and go on")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(), "checkpoint")
    source, out = folder / "source", folder / "out"
    if args.child:
        return prune(source, out, args.method, args.share, args.kill)
    try:
        sizes, most = (LLAMA7B, 5 * 10**9) if args.llama7b else (SMALL, 20 * 10**6)
        total = write_checkpoint(source, sizes, most)
        command = [sys.executable, __file__, "--child", "--folder", str(folder)]
        command += ["--method", args.method, "--share", str(args.share)]
        if args.kill:
            subprocess.run([*command, "--kill"], stdout=subprocess.DEVNULL)
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        written = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
        print(json.dumps({"read_gb": total / 1e9, "written_gb": written / 1e9, **json.loads(told)}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
