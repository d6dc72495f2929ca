"""Load mutated files of every kind: each load must succeed, or be refused by an IntrafuseError.

    .venv/bin/python benchmarks/fuzz.py --loads 1000000 --seed 0 [--workers 1] [--kinds plans]

Counts raw exceptions, hangs (over 2 s of processor time, or 30 s in all), loads that took over
256 MB more, and files that were accepted and are not what was saved. Files that show a defect are
kept below runs/fuzz/. A run that was stopped goes on from runs/fuzz/loads.json, unless --again.
One load is made again by --kinds KIND --only NUMBER.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from alarm import within
from fuzz_kinds import KINDS, Changed

from intrafuse import IntrafuseError

# Of all loads; what is cheap and simple has fewer ways to fail.
SHARES = {
    **{"manifests": 0.25, "weights": 0.25, "plans": 0.1},
    **{"records": 0.15, "recipes": 0.1, "states": 0.15},
}
SECONDS, WALL, BYTES = 2.0, 30.0, 256 * 2**20
CHUNK = 5000
OUT = Path(__file__).resolve().parents[1] / "runs" / "fuzz"
DEFECTS = ("raw", "hang", "memory", "changed")
_made: dict[str, Any] = {}


class _Hang(BaseException):
    """A load takes too long; no `except Exception` stops this."""


def _status(field: bytes) -> int:
    """Read a size of this process in bytes."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        text = file.read()
    return int(text.partition(field)[2].split(maxsplit=1)[0]) * 1024


def measured(kind: Any, content: bytes) -> tuple[str, str, float, int]:
    """Load once: what came of it, a traceback, seconds of the processor, and bytes at most."""
    told = ""
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")  # forget the peak so far
    memory, started = _status(b"VmRSS:"), time.process_time()
    try:
        with within(WALL, _Hang):
            outcome = "accepted" if kind.load(content) else "refused"
    except IntrafuseError as error:
        outcome, told = "refused", ""
        str(error).encode("utf-8", "surrogatepass")
    except Changed:
        outcome, told = "changed", traceback.format_exc()
    except _Hang:
        outcome, told = "hang", traceback.format_exc()
    except BaseException:
        outcome, told = "raw", traceback.format_exc()
    seconds, peak = time.process_time() - started, _status(b"VmHWM:") - memory
    if seconds > SECONDS:
        outcome, told = "hang", f"{seconds:.1f} s of processor time\n{told}"
    if peak > BYTES:
        outcome, told = "memory", f"{peak / 2**20:.0f} MB\n{told}"
    return outcome, told, seconds, peak


def run_chunk(name: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """Make and load a number of mutants of one kind, and keep those that show a defect."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(1000)
    if name not in _made:
        shared = Path("/dev/shm")
        place = tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None)
        _made[name] = KINDS[name](Path(place))
        gc.collect()
        gc.freeze()  # what stays need not be looked through again
    kind, found = _made[name], Counter()
    longest, largest, began = 0.0, 0, time.perf_counter()
    for number in range(first, first + count):
        content = kind.mutant(Random(f"{seed} {name} {number}"))
        outcome, told, seconds, peak = measured(kind, content)
        found[outcome] += 1
        longest, largest = max(longest, seconds), max(largest, peak)
        if outcome in DEFECTS:
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / f"{name}-{seed}-{number}-{outcome}").write_bytes(content)
            (OUT / f"{name}-{seed}-{number}-{outcome}.txt").write_text(
                told, "utf-8", errors="backslashreplace"
            )
    spent = time.perf_counter() - began
    return {"loads": count, **found, "longest": longest, "largest": largest, "seconds": spent}


def chunks(loads: int, kinds: list[str], seed: int) -> Iterator[tuple[str, int, int, int]]:
    """Divide the loads among kinds and chunks, the kinds in turn."""
    total = sum(SHARES[name] for name in kinds)
    left = {name: round(loads * SHARES[name] / total) for name in kinds}
    done = dict.fromkeys(kinds, 0)
    while any(left.values()):
        for name in kinds:
            count = min(CHUNK, left[name])
            if count:
                yield name, done[name], count, seed
            done[name] += count
            left[name] -= count


def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counts of chunks."""
    keys = ("loads", "accepted", "refused", *DEFECTS, "seconds")
    found: dict[str, Any] = {key: sum(part.get(key, 0) for part in parts) for key in keys}
    for key in ("longest", "largest"):
        found[key] = max((part[key] for part in parts), default=0)
    return found


def show(done: dict[str, dict[str, Any]], kinds: list[str]) -> None:
    """Print a row for each kind, and one for all."""
    columns = ("loads", "accepted", "refused", *DEFECTS)
    print(
        f"{'kind':10}" + "".join(f"{c:>10}" for c in columns) + "   longest s  largest MB   ms/load"
    )
    rows = {name: [p for key, p in done.items() if key.startswith(f"{name}/")] for name in kinds}
    for name, parts in {**rows, "all": [p for row in rows.values() for p in row]}.items():
        row = summed(parts)
        print(
            f"{name:10}"
            + "".join(f"{row[c]:>10,}" for c in columns)
            + f"{row['longest']:>12.2f}{row['largest'] / 2**20:>12.0f}"
            + f"{1000 * row['seconds'] / max(row['loads'], 1):>10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--again", action="store_true", help="forget what an earlier run did")
    parser.add_argument("--only", type=int, help="one load, by its number")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.only is not None:
        print(run_chunk(kinds[0], options.only, 1, options.seed))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "loads.json"
    done = json.loads(file.read_text()) if file.exists() and not options.again else {}
    left = [
        chunk
        for chunk in chunks(options.loads, kinds, options.seed)
        if f"{chunk[0]}/{options.seed}/{chunk[1]}/{chunk[2]}" not in done
    ]
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"))
    try:
        running = {pool.submit(run_chunk, *chunk): chunk for chunk in left}
        for i, future in enumerate(as_completed(running), 1):
            name, first, count, seed = running[future]
            done[f"{name}/{seed}/{first}/{count}"] = future.result()
            file.write_text(json.dumps(done, indent=1))
            bad = {d: n for d in DEFECTS if (n := summed(list(done.values()))[d])}
            print(f"\r{i} of {len(left)} chunks {bad or ''}", end="", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(file=sys.stderr)
    show(done, kinds)
    if any(summed(list(done.values()))[defect] for defect in DEFECTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
