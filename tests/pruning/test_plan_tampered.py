"""Plans that somebody changed: refused when read, or by one error before a model is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import build, same_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import intrafuse
from intrafuse import IntrafuseError, Plan
from intrafuse.support.reading import MOST_LEVELS

torch.set_num_threads(1)

MATRICES = ("encode", "decode", "carry")
Data = dict
Change = Callable[[Data, dict[str, Tensor]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save the plan of a residual network."""
    model, x = build("residual")
    intrafuse.plan(model, x, channels=0.5).save(tmp_path / "plan")
    return tmp_path / "plan"


def rewrite(path: Path, change: Change) -> None:
    """Change the data and the tensors of a plan."""
    with safe_open(str(path), "pt") as file:
        data = json.loads((file.metadata() or {})["plan"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    text = change(data, tensors)
    text = text if isinstance(text, str) else json.dumps(data)
    save_file(tensors, path, {"plan": text})


def retype(dtype: torch.dtype, name: str = "0/encode") -> Change:
    return lambda data, tensors: tensors.update({name: tensors[name].to(dtype)})


def first(data: Data) -> Data:
    return data["graph"]["groups"][0]


REFUSED: dict[str, Change] = {
    "deep": lambda d, t: "[" * 100_000,
    "levels": lambda d, t: "[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1),
    "no data": lambda d, t: "3",
    "a list": lambda d, t: "[]",
    "a name twice": lambda d, t: '{"format": 1, "format": 1}',
    "deep tree": lambda d, t: d["graph"]["attributes"][0].__setitem__(2, {"+": [{"*": [[]]}]}),
    "huge size": lambda d, t: d["graph"]["sizes"].update({str(first(d)["id"]): 2**63}),
    "huger size": lambda d, t: d["graph"]["sizes"].update({str(first(d)["id"]): 10**400}),
    "negative size": lambda d, t: d["graph"]["sizes"].update({str(first(d)["id"]): -4}),
    "other size": lambda d, t: first(d).update(size=3),
    "text for size": lambda d, t: first(d).update(size="4"),
    "true for size": lambda d, t: first(d).update(size=True),
    "huge costs": lambda d, t: [cost.__setitem__(1, 1e308) for cost in d["graph"]["costs"]],
    "infinite costs": lambda d, t: [cost.__setitem__(1, 1e999) for cost in d["graph"]["costs"]],
    "other costs": lambda d, t: d["graph"]["costs"].pop(),
    "no figures": lambda d, t: d.update(before=None),
    "other figures": lambda d, t: d["after"].update(macs=1),
    "negative figures": lambda d, t: d["before"].update(params=-1),
    "seconds": lambda d, t: d.update(seconds=float("nan")),
    "settings": lambda d, t: d.update(settings=[]),
    "method": lambda d, t: d["settings"].update(method=["select"]),
    "notes": lambda d, t: d.update(notes=[3]),
    "fewer notes": lambda d, t: d.update(notes=[]),
    "unknown group": lambda d, t: d["groups"].__setitem__(0, "q"),
    "a group twice": lambda d, t: d["groups"].__setitem__(0, d["groups"][1]),
    "groups of one name": lambda d, t: d["graph"]["groups"][1].update(name=first(d)["name"]),
    "unknown parameter": lambda d, t: first(d)["slots"][0].__setitem__(0, "q"),
    "unknown axis": lambda d, t: first(d)["slots"][0].__setitem__(1, 7),
    "negative axis": lambda d, t: first(d)["slots"][0].__setitem__(1, -1),
    "unknown role": lambda d, t: first(d)["slots"][0].__setitem__(2, "owner"),
    "unknown atom": lambda d, t: d["graph"]["sizes"].clear(),
    "more fields": lambda d, t: d["graph"].update(code="x"),
    "float8": retype(torch.float8_e4m3fn),
    "complex": retype(torch.complex64),
    "whole numbers": retype(torch.int32),
    "bool": retype(torch.bool),
    "no matrix": lambda d, t: t.update({"0/encode": torch.tensor(1.0)}),
    "empty matrix": lambda d, t: t.update({f"0/{n}": torch.zeros(0, 0) for n in MATRICES}),
    "unknown part": lambda d, t: t.update({"0/q:a": torch.zeros(1)}),
    "NaN": lambda d, t: t["0/decode"].fill_(torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_contradict_themselves_are_refused(saved, case):
    rewrite(saved, REFUSED[case])
    with pytest.raises(IntrafuseError) as caught:
        Plan.load(saved)
    assert "\n" not in str(caught.value)


LATE: dict[str, Change] = {
    "unknown module": lambda d, t: d["graph"]["attributes"][0].__setitem__(0, "q"),
    "unknown attribute": lambda d, t: d["graph"]["attributes"][0].__setitem__(1, "q"),
    "unknown alias": lambda d, t: d["graph"]["aliases"].update({"q.weight": "stem.weight"}),
    "unknown bias": lambda d, t: d["graph"]["layers"][0].update(bias="q.bias"),
    "unknown norm": lambda d, t: d["graph"]["norms"][0].update(mean="q"),
    "unknown layer": lambda d, t: d["graph"]["norms"][0].update(layer="q"),
    "layer's axis": lambda d, t: [layer.update(output_axis=9) for layer in d["graph"]["layers"]],
    "gain of nothing": lambda d, t: t.update({"0/gain:q": torch.ones(4)}),
    "gain of the wrong length": lambda d, t: t.update({"0/gain:fc.weight": torch.ones(77)}),
    "writers' gain of nothing": lambda d, t: t.update({"0/writer_gain:q": torch.ones(4)}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", LATE)
def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(saved, case, inplace):
    rewrite(saved, LATE[case])
    model, _ = build("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = str(model)
    with pytest.raises(IntrafuseError):
        plan = Plan.load(saved)
        str(plan)
        json.dumps(plan.as_data())
        plan.apply(model, inplace=inplace)
    assert same_state(model, before) and str(model) == text


def test_settings_that_are_absent_are_empty_in_the_data(saved):
    rewrite(saved, lambda d, t: d.update(settings={}))
    plan = Plan.load(saved)
    assert plan.as_data()["method"] is None and "Plan: ?" in str(plan)


def test_a_plan_of_a_folder_must_be_the_one_that_was_saved(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    from language_models import transformers

    size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 9}
    config = transformers.BertConfig(num_hidden_layers=1, max_position_embeddings=16, **size)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    small = intrafuse.prune(model, torch.tensor([[1, 2, 3]]), channels=0.25)
    folder = intrafuse.save(tmp_path / "bert", small)
    fresh = transformers.BertModel(config, add_pooling_layer=False)
    assert same_state(intrafuse.load(folder, fresh), small.model.state_dict())
    rewrite(folder / "plan.safetensors", lambda d, t: d.update(seconds=9.0))
    fresh = transformers.BertModel(config, add_pooling_layer=False)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(IntrafuseError, match="plan is corrupt"):
        intrafuse.load(folder, fresh)
    assert same_state(fresh, before)
