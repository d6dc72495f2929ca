"""What the fuzzers load: one class for each kind of file, with what must hold of each load.

A kind gives mutated bytes for a `random.Random`, and loads them. `load` returns whether they were
accepted; it raises IntrafuseError where they were refused, and Changed where they were taken for
what they are not. Everything else that comes out of it is a defect.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from mutations import as_text, bytes_of, edited, pack_safetensors, tensors_file, unpack_safetensors
from torch import Tensor, nn

import intrafuse
from intrafuse.catalog.zoo import file_sha256, load_weights, resolve_model
from intrafuse.checkpoint.folder import MANIFEST, WEIGHTS
from intrafuse.checkpoint.manifest import signed
from intrafuse.study.evaluate.landscape import _Kept
from intrafuse.study.factorize.recipe import read_recipe
from intrafuse.study.factorize.result import RESULT, read_result
from intrafuse.study.factorize.splits import split
from intrafuse.study.report.read import read_entries

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from records import RECORDS

__all__ = ["KINDS", "Changed"]

LABELS = torch.arange(200) % 10


class Changed(Exception):
    """A file was accepted, and gives what was never saved."""


def state(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two networks hold the same tensors, bit for bit."""
    one, two = state(first), state(second)
    return one.keys() == two.keys() and all(
        t.dtype == two[n].dtype and t.shape == two[n].shape and torch.equal(t, two[n])
        for n, t in one.items()
    )


def filled(model: nn.Module) -> nn.Module:
    """Give the statistics of batch norm numbers of their own."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.add_(
                torch.rand(buffer.shape, generator=generator) * (0.5 if "var" in name else 1)
            )
    return model.eval()


def text_of(content: str) -> bytes:
    return content.encode("utf-8", "surrogatepass")


class Saved:
    """Networks that were saved, each with its folder and its files."""

    def __init__(self, folder: Path) -> None:
        self.folders, self.models, self.files = [], [], []
        for i, (name, arguments, method) in enumerate(
            (
                ("mlp", {"hidden": [8, 6]}, "intra-fusion"),
                ("mlp", {"hidden": [5], "num_classes": 3}, None),
                ("mlp", {"hidden": [8, 6]}, "select"),
                ("digits_resnet", {"width": 0.125}, "intra-fusion"),
            )
        ):
            torch.manual_seed(i)
            net = resolve_model(name, **arguments)
            model: Any = filled(net.model)
            if method is not None:
                model = intrafuse.prune(model, net.example_inputs, channels=0.4, method=method)
            place = intrafuse.save(folder / str(i), model, architecture=name, arguments=arguments)
            self.folders.append(place)
            self.models.append(intrafuse.load(place))
            self.files.append({path.name: path.read_bytes() for path in place.iterdir()})

    def restored(self, which: int, **changed: bytes) -> Path:
        """Write one folder anew, with some files changed."""
        for name, content in {**self.files[which], **changed}.items():
            (self.folders[which] / name).write_bytes(content)
        return self.folders[which]


class Manifests:
    """`intrafuse.json` of a saved network; every third has a digest that fits what it says."""

    def __init__(self, folder: Path) -> None:
        self.saved = Saved(folder)

    def mutant(self, random: Random) -> bytes:
        which, way = random.choice((0, 0, 1, 1, 1, 2, 2, 3)), random.randrange(6)
        content = self.saved.files[which][MANIFEST]
        if way == 0:
            content = bytes_of(content, random)
        else:
            data = edited(json.loads(content), random)
            if way < 3 and isinstance(data, dict):
                data = signed(data)
            content = text_of(as_text(data, random))
        return bytes((which, 0 < way < 3)) + content

    def load(self, content: bytes) -> bool:
        which, forged, content = content[0], content[1], content[2:]
        (self.saved.folders[which] / MANIFEST).write_bytes(content)
        model, original = intrafuse.load(self.saved.folders[which]), self.saved.models[which]
        if not same(model, original) or (not forged and str(model) != str(original)):
            raise Changed(str(model))
        return True


class Weights:
    """`model.safetensors`: in a folder, in a folder that was signed anew, and as --weights."""

    def __init__(self, folder: Path) -> None:
        self.saved = Saved(folder)
        self.model = filled(resolve_model("mlp", hidden=[5], num_classes=3).model)
        self.before = copy.deepcopy(self.model)
        self.file = folder / "alone.safetensors"

    def mutant(self, random: Random) -> bytes:
        way = random.randrange(3)
        which = 1 if way == 2 else random.choice((0, 0, 1, 1, 1, 2, 2, 3))
        return bytes((which, way)) + tensors_file(self.saved.files[which][WEIGHTS], random)

    def load(self, content: bytes) -> bool:
        which, way, content = content[0], content[1], content[2:]
        if way == 2:
            return self._alone(content)
        folder = self.saved.folders[which]
        (folder / WEIGHTS).write_bytes(content)
        manifest = self.saved.files[which][MANIFEST]
        if way == 1:
            data = json.loads(manifest)
            data["files"][WEIGHTS] = file_sha256(folder / WEIGHTS)
            manifest = json.dumps(signed(data)).encode()
        (folder / MANIFEST).write_bytes(manifest)
        model = intrafuse.load(folder)
        if way == 0 and not same(model, self.saved.models[which]):
            raise Changed(str(model))
        self._require_finite(model)
        return True

    def _alone(self, content: bytes) -> bool:
        self.file.write_bytes(content)
        try:
            load_weights(self.model, self.file)
        except intrafuse.IntrafuseError:
            if not same(self.model, self.before):
                raise Changed("a model was changed by a file that was refused") from None
            raise
        self._require_finite(self.model)
        self.model.load_state_dict(self.before.state_dict())
        return True

    def _require_finite(self, model: nn.Module) -> None:
        for name, tensor in state(model).items():
            if tensor.is_meta or not torch.isfinite(tensor).all():
                raise Changed(f"{name} is not finite")


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(6, 24), nn.LayerNorm(8)
        self.out, self.table = nn.Linear(8, 3), nn.Embedding(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.table(x)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(self.norm(mixed)).mean(1)


class Plans:
    """`plan.safetensors`: loaded, printed, written as data and applied."""

    def __init__(self, folder: Path) -> None:
        self.file, self.models, self.files = folder / "plan.safetensors", [], []
        small = {"digits_resnet": {"width": 0.25}, "mlp": {"hidden": [8, 6]}}
        for i, (name, method) in enumerate(
            (
                *(("mlp", "intra-fusion"), ("mlp", "moment"), ("attention", "select")),
                *(("digits_resnet", "moment"), ("digits_resnet", "intra-fusion")),
            )
        ):
            torch.manual_seed(i)
            if name == "attention":
                model, example = _Attention().eval(), (torch.tensor([[0, 1, 2]]),)
            else:
                net = resolve_model(name, **small[name])
                model, example = filled(net.model), net.example_inputs
            plan = intrafuse.plan(model, example, channels=0.4, method=method)
            plan.save(self.file)
            self.models.append(model)
            self.files.append(self.file.read_bytes())

    def mutant(self, random: Random) -> bytes:
        which = random.choice((0, 0, 0, 1, 1, 2, 2, 3, 4))
        content = self.files[which]
        if random.random() < 0.4:
            return bytes((which, random.randrange(256))) + tensors_file(content, random)
        header, data = unpack_safetensors(content)
        told = json.loads(header["__metadata__"]["plan"])
        part = random.choice(("graph", "graph", "graph", ""))
        if part:
            told[part] = edited(told[part], random)
        else:
            told = edited(told, random)
        header["__metadata__"]["plan"] = as_text(told, random)
        return bytes((which, random.randrange(256))) + pack_safetensors(header, data)

    def load(self, content: bytes) -> bool:
        which, dice, content = content[0], content[1], content[2:]
        self.file.write_bytes(content)
        plan = intrafuse.Plan.load(self.file)
        json.dumps(plan.as_data())
        plan.shapes()
        if dice < 16:
            str(plan).encode("utf-8")
        if dice < 128:
            return True
        model = self.models[which]
        before = state(model) if dice < 192 else {}
        before = {name: tensor.clone() for name, tensor in before.items()}
        try:
            plan.apply(model)
        finally:
            if any(not torch.equal(t, before[n]) for n, t in state(model).items() if n in before):
                raise Changed("a plan changed its source")
        return True


class Records:
    """Records of all kinds, and the result of a run, as a report reads them."""

    def __init__(self, folder: Path) -> None:
        self.file, self.run = folder / "record.json", folder / "run"
        self.run.mkdir(exist_ok=True)
        self.texts = [json.dumps({"kind": kind, **record}) for kind, record in RECORDS.items()]
        times = {"start": 1.0, "end": 2.0, "making": 0.5}
        run = json.loads(json.dumps(RECORDS["factorized"]))
        run |= {"kind": "factorized", "parallel": 2, "threads": 1, "sent": 10, "wall": 3.0}
        run["records"] = [{**stage, **times} for stage in run["records"]]
        self.texts.append(json.dumps(run))
        pruned = {"kind": "pruning", **RECORDS["pruning"], "out": "runs/small", "command": "x"}
        self.texts.insert(0, json.dumps(pruned))

    def mutant(self, random: Random) -> bytes:
        which = random.randrange(len(self.texts))
        if random.random() < 0.15:
            content = bytes_of(self.texts[which].encode(), random)
        else:
            data = edited(json.loads(self.texts[which]), random)
            if isinstance(data, dict) and random.random() < 0.9:
                data["kind"] = json.loads(self.texts[which])["kind"]
            content = text_of(as_text(data, random))
        return bytes((which,)) + content

    def load(self, content: bytes) -> bool:
        if content[0] == len(self.texts) - 1:
            (self.run / RESULT).write_bytes(content[1:])
            str(read_result(self.run))
            return True
        self.file.write_bytes(content[1:])
        for entry in read_entries([self.file]):
            _ = entry.name, entry.recipe
        return True


class Recipes:
    """Recipes in YAML, and how they split the data."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "recipe.yaml"
        training = {"epochs": 3, "batch": 16, "rate": 0.1, "schedule": "one-cycle"}
        self.recipes = [
            {"scheme": "fap", "model": "mlp", "training": "short", "seed": 3},
            {
                **{"scheme": "paf", "model": "mlp", "arguments": {"hidden": [8, 4]}},
                **{"splits": {"scheme": "k-fold", "folds": 4}, "training": training},
                "pruning": {"channels": 0.5, "method": "select", "exclude": ["a", "b"], "steps": 2},
            },
            {
                **{"scheme": "fap", "model": "mlp", "data": "digits", "private": False},
                "splits": {"scheme": "dirichlet", "folds": 3, "alpha": 0.3},
                "fusing": {"method": "ot", "features": "auto", "samples": 50, "repair": "none"},
            },
            {
                **{"scheme": "whole", "model": "resnet20", "fused": training},
                "splits": {"scheme": "overlapping", "folds": 2, "overlap": 0.25},
            },
        ]

    def mutant(self, random: Random) -> bytes:
        recipe = random.choice(self.recipes)
        way = random.randrange(10)
        if way < 5:
            return text_of(as_text(edited(json.loads(json.dumps(recipe)), random), random))
        lines = yaml.dump(recipe, Dumper=yaml.CSafeDumper, sort_keys=False).splitlines()
        if way < 7:
            return bytes_of("\n".join(lines).encode(), random)
        for _ in range(random.choice((1, 2, 3))):
            at = random.randrange(len(lines))
            line, word = lines[at], random.choice(YAML)
            key, colon, _ = line.partition(":")
            lines[at : at + 1] = random.choice(
                ([f"{key}{colon} {word}"], [line, word], [f"{line} {word}"], [line, line], [])
            ) or ["x:"]
        return text_of("\n".join(lines))

    def load(self, content: bytes) -> bool:
        self.file.write_bytes(content)
        recipe = read_recipe(self.file)
        if recipe.splits.scheme not in ("files", "places"):
            split(recipe.splits, LABELS, seed=recipe.seed)
        _ = recipe.digest
        return True


YAML = (
    *("&a [1, 2]", "*a", "<<: *a", "!!python/object/apply:os.system [ls]", "!!binary x", "? x"),
    *("!!timestamp foo", "2020-99-99", "1:2:3", ".inf", ".nan", "0x" + "f" * 4000, "9" * 5000),
    *("[" * 5000, "{" * 300, "- " * 500, "- [*a, *a, *a]", "&b", "%YAML 9.9", "---", "...", "|"),
    *("'", '"\\ud800"', "\t", "40", "998", "k-fold", "dirichlet", "1e308", "1e-320", "null", "~"),
    *("!!int ''", "0b_", "=", "2001-12-14t21:59:43.10-25:99", "{a: 1, a: 2}", "? [a]\n: b", "\x85"),
)


class States:
    """`--state` of a landscape."""

    def __init__(self, folder: Path) -> None:
        self.file, self.identity = folder / "state.json", "ab" * 32
        values = {f"anchor {i}": 90.5 - i for i in range(3)}
        values |= {f"{i} {j}": 10.0 * i + j / 3 for i in range(3) for j in range(3)}
        self.content = {"identity": self.identity, "values": values}

    def mutant(self, random: Random) -> bytes:
        text = json.dumps(self.content)
        if random.random() < 0.25:
            return bytes_of(text.encode(), random)
        return text_of(as_text(edited(json.loads(text), random), random))

    def load(self, content: bytes) -> bool:
        self.file.write_bytes(content)
        kept = _Kept(self.file, self.identity)
        for name, value in kept.values.items():
            if type(value) is not float or not 0 <= value < float("inf"):
                raise Changed(f"{name} is {value!r}")
        return True


KINDS: dict[str, Callable[[Path], Any]] = {
    "manifests": Manifests,
    "weights": Weights,
    "plans": Plans,
    "records": Records,
    "recipes": Recipes,
    "states": States,
}
