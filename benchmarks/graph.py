"""How long the graph of a language model takes, and how that grows with its depth.

Llama configurations of 8, 16, 32 and 64 layers, 4096 wide, on the meta device (no weights are
held), each in a process of its own, so that its peak of memory is its own. Then torch-pruning
1.6.1 side by side, up to the largest of each ladder that it finishes in five minutes: Llama
configurations, and DenseNets, where the channels of each layer go into all that follow. Both sides
are timed by the CPU in a process of their own, after what they import. `--ratios` holds a trace of
architectures of the zoo beside one `torch.export` of each, as intrafuse calls it, by the CPU.

    pip install -c constraints.txt -e ".[hf]"
    pip install --no-deps torch-pruning==1.6.1     # for the comparison only
    python benchmarks/graph.py [--limit SECONDS] [--skip-others] [--ladders densenet]
    python benchmarks/graph.py --ratios
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

DEPTHS = (8, 16, 32, 64)
RATIOS = (
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:densenet121",
    "torchvision:mobilenet_v3_small", "torchvision:vit_b_32", "torchvision:swin_t",
    "torchvision:raft_small", "hf:bert", "hf:gpt2", "hf:llama", "hf:t5", "hf:whisper",
    "timm:vit_tiny_patch16_224", "timm:levit_128s", "timm:xcit_nano_12_p16_224",
)  # fmt: skip
LADDERS = {
    "llama": ((4, 512), (16, 1024), (32, 1024)),
    "densenet": ((24, 16), (48, 32), (64, 48), (96, 72), (104, 80), (112, 88), (128, 96)),
}


def llama_of(layers: int, width: int, device: str):
    """Build a Llama of some depth and width, with its heads 128 wide as in the 7B model."""
    import torch
    from architectures import import_torchvision

    import_torchvision()
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


def densenet_of(third: int, fourth: int, device: str):
    """Build a DenseNet: 6 and 12 layers in its first two blocks, then as many as are given."""
    import torch
    from architectures import import_torchvision

    import_torchvision()
    from torchvision.models import DenseNet

    with torch.device(device):
        return DenseNet(32, (6, 12, third, fourth)).eval(), torch.zeros(1, 3, 64, 64)


def network(kind: str, first: int, second: int, device: str):
    """Build a network of a ladder, and inputs for it."""
    return (llama_of if kind == "llama" else densenet_of)(first, second, device)


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(kind: str, layers: int, width: int, device: str) -> dict[str, float]:
    """Trace by intrafuse."""
    import intrafuse

    small, inputs = network(kind, 1, 64 if kind == "llama" else 1, device)
    intrafuse.trace(small, (inputs,))  # what is imported on first use
    model, inputs = network(kind, layers, width, device)
    before = peak()
    started = time.perf_counter(), time.process_time()
    graph = intrafuse.trace(model, (inputs,))
    seconds, busy = time.perf_counter() - started[0], time.process_time() - started[1]
    nodes = len(graph.program.nodes)
    return {
        "seconds": seconds, "cpu": busy, "mib": peak() - before, "groups": len(graph.groups),
        "nodes": nodes,
    }  # fmt: skip


def theirs(kind: str, layers: int, width: int, device: str) -> dict[str, float]:
    """Trace by torch-pruning, and list its groups: ours come with the graph."""
    import torch_pruning

    model, inputs = network(kind, layers, width, device)
    last = model.lm_head if kind == "llama" else model.classifier
    before = peak()
    started = time.perf_counter(), time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=inputs, output_transform=lambda out: getattr(out, "logits", out).sum()
    )
    groups = sum(1 for _ in graph.get_all_groups(ignored_layers=[last]))
    seconds, busy = time.perf_counter() - started[0], time.process_time() - started[1]
    nodes = len(graph.module2node)
    return {
        "seconds": seconds, "cpu": busy, "mib": peak() - before, "groups": groups, "nodes": nodes
    }  # fmt: skip


def apart(which: str, kind: str, layers: int, width: int, device: str, limit: float) -> dict | None:
    """Measure in a process of its own; None where it takes too long or fails."""
    command = [sys.executable, __file__, "--one", which, kind, str(layers), str(width), device]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=alone)
    except subprocess.TimeoutExpired:
        print(f"  {which} did not finish {kind} {layers} x {width} in {limit:.0f} s")
        return None
    if done.returncode:
        print(f"  {which} failed: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def growth(limit: float) -> None:
    """Print time and memory of our graph by depth."""
    print("intrafuse, Llama 4096 wide on the meta device")
    print("layers   nodes  groups  seconds  CPU s   MiB  CPU ms for each layer")
    for layers in DEPTHS:
        found = apart("ours", "llama", layers, 4096, "meta", limit)
        if found:
            each = 1000 * found["cpu"] / layers
            print(
                f"{layers:6d} {found['nodes']:7d} {found['groups']:7d} {found['seconds']:8.2f} "
                f"{found['cpu']:6.2f} {found['mib']:5.0f} {each:22.0f}"
            )


def comparison(limit: float, ladders: list[str]) -> None:
    """Print both tools' times up to the largest network that torch-pruning finishes."""
    print("torch-pruning 1.6.1 beside intrafuse, on the CPU")
    for kind in ladders:
        for layers, width in LADDERS[kind]:
            other = apart("theirs", kind, layers, width, "cpu", limit)
            if other is None:
                break
            own = apart("ours", kind, layers, width, "cpu", limit)
            if own:
                print(
                    f"{kind} {layers:3d} x {width:4d}: torch-pruning {other['cpu']:8.2f} CPU s, "
                    f"{other['groups']} groups; intrafuse {own['cpu']:6.2f} CPU s, "
                    f"{own['groups']} groups; ratio {other['cpu'] / own['cpu']:.2f}",
                    flush=True,
                )


def ratios(names: tuple[str, ...]) -> None:
    """Print the time of a trace beside that of one export."""
    import torch
    from architectures import build

    import intrafuse
    from intrafuse.graph.export import export_program

    torch.set_num_threads(1)
    print("architecture                     export  trace  ratio   CPU s")
    for name in names:
        model, inputs = build(name)
        export_program(model, inputs)  # what is imported on first use
        started = time.process_time()
        export_program(model, inputs)
        one = time.process_time() - started
        intrafuse.trace(model, inputs)
        whole = time.process_time() - started - one
        print(f"{name:32s} {one:6.2f} {whole:6.2f} {whole / one:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--skip-others", action="store_true")
    parser.add_argument("--ladders", default=",".join(LADDERS), help="some, and no growth")
    parser.add_argument("--ratios", action="store_true", help="a trace beside one export")
    parser.add_argument("--one", nargs=5)
    options = parser.parse_args()
    if options.one:
        which, kind, layers, width, device = options.one
        measure = ours if which == "ours" else theirs
        print(json.dumps(measure(kind, int(layers), int(width), device)))
        return
    if options.ratios:
        ratios(RATIOS)
        return
    ladders = options.ladders.split(",")
    if ladders == [*LADDERS]:
        growth(options.limit)
    if not options.skip_others:
        comparison(options.limit, ladders)


if __name__ == "__main__":
    main()
