"""How long the graph of a language model takes, and how that grows with its depth.

Llama configurations of 8, 16, 32 and 64 layers, 4096 wide, on the meta device (no weights are
held), each in a process of its own, so that its peak of memory is its own. Then the largest of a
ladder of smaller ones that torch-pruning 1.6.1 traces within five minutes, side by side.

    pip install -c constraints.txt -e ".[hf]"
    pip install --no-deps torch-pruning==1.6.1     # for the comparison only
    python benchmarks/graph.py [--limit SECONDS] [--skip-others]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

DEPTHS = (8, 16, 32, 64)
LADDER = ((2, 64), (2, 256), (4, 256), (4, 512), (8, 512), (8, 1024), (16, 1024), (32, 1024))


def model_of(layers: int, width: int, device: str):
    """Build a Llama of some depth and width, with its heads 128 wide as in the 7B model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(width // 128, 2)
    config = LlamaConfig(
        vocab_size=32000 if width == 4096 else 256,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
        tokens = torch.ones(1, 16, dtype=torch.long)
    model.config.use_cache = False
    return model, tokens


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(layers: int, width: int, device: str) -> dict[str, float]:
    """Trace by intrafuse."""
    import intrafuse

    model, tokens = model_of(layers, width, device)
    before = peak()
    started = time.perf_counter()
    graph = intrafuse.trace(model, {"input_ids": tokens})
    seconds = time.perf_counter() - started
    nodes = len(graph.program.nodes)
    return {
        "seconds": seconds, "mib": peak() - before, "groups": len(graph.groups), "nodes": nodes
    }  # fmt: skip


def theirs(layers: int, width: int, device: str) -> dict[str, float]:
    """Trace by torch-pruning, with the inputs that its documentation gives."""
    import torch_pruning

    model, tokens = model_of(layers, width, device)
    before = peak()
    started = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=tokens, output_transform=lambda out: out.logits.sum()
    )
    seconds = time.perf_counter() - started
    nodes = len(graph.module2node)
    return {"seconds": seconds, "mib": peak() - before, "nodes": nodes}


def apart(which: str, layers: int, width: int, device: str, limit: float) -> dict | None:
    """Measure in a process of its own; None where it takes too long or fails."""
    command = [sys.executable, __file__, "--one", which, str(layers), str(width), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"  {which} did not finish {layers} layers of {width} in {limit:.0f} s")
        return None
    if done.returncode:
        print(f"  {which} failed: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def growth(limit: float) -> None:
    """Print time and memory of our graph by depth."""
    print("intrafuse, Llama 4096 wide on the meta device")
    print("layers   nodes  groups  seconds   MiB  ms for each layer")
    for layers in DEPTHS:
        found = apart("ours", layers, 4096, "meta", limit)
        if found:
            each = 1000 * found["seconds"] / layers
            print(
                f"{layers:6d} {found['nodes']:7d} {found['groups']:7d} {found['seconds']:8.2f} "
                f"{found['mib']:5.0f} {each:18.0f}"
            )


def comparison(limit: float) -> None:
    """Print both tools' times up to the largest network that torch-pruning finishes."""
    print("torch-pruning 1.6.1 beside intrafuse, on the CPU")
    for layers, width in LADDER:
        other = apart("theirs", layers, width, "cpu", limit)
        if other is None:
            break
        own = apart("ours", layers, width, "cpu", limit)
        if own:
            print(
                f"{layers:3d} layers of {width:4d}: torch-pruning {other['seconds']:8.2f} s, "
                f"intrafuse {own['seconds']:6.2f} s, ratio {other['seconds'] / own['seconds']:.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--skip-others", action="store_true")
    parser.add_argument("--one", nargs=4)
    options = parser.parse_args()
    if options.one:
        which, layers, width, device = options.one
        measure = ours if which == "ours" else theirs
        print(json.dumps(measure(int(layers), int(width), device)))
        return
    growth(options.limit)
    if not options.skip_others:
        comparison(options.limit)


if __name__ == "__main__":
    main()
