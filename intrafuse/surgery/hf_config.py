"""Let the configuration of a Hugging Face model follow its sizes, so that it can be built again.

A configuration says one number for all layers. Where the layers agree, the fields with that number
are changed, so that `save_pretrained` and `from_pretrained` give the same network again; what each
field means is found out by building the model from it, without memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from math import log
from typing import Any

import torch
from torch import nn

__all__ = ["follow_sizes", "has_config", "take_configuration"]

PAIRS = 40  # of fields that are tried together: each builds the model once
WORDS = ("dim", "size", "inner", "heads")  # in the names of fields that are None by default


def follow_sizes(model: nn.Module, changes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Change the fields of a model's configuration that say its sizes.

    A field is changed where that brings the model that the configuration describes nearer to this
    one. What a configuration cannot say (layers of different widths, heads of BERT, whose width is
    always the model's divided by their number) stays as it was, and `from_pretrained` then refuses
    the weights by their shapes; `intrafuse.load` takes them.

    Args:
        model: a pruned model; without a configuration nothing happens.
        changes: sizes before and after.

    Returns:
        The fields that were changed.
    """
    if not has_config(model):
        return {}
    config = model.config
    options = list(_options(config, model, {(old, new) for old, new in changes if old != new}))
    base = _built(model, config, {}) if options else None
    if base is None:
        return {}
    pins = _pins(config, model)
    pinned = _built(model, config, pins) if pins else None
    if pinned is None or _misfit(model, pinned, base) == float("inf"):
        pins = {}
    found, best, improved = dict(pins), _misfit(model, base, base), True
    while best and improved:
        improved = False
        for fields in _steps(config, options):
            if improved and len(fields) > 1:
                break
            built = _built(model, config, {**found, **fields})
            misfit = float("inf") if built is None else _misfit(model, built, base)
            if misfit < best - 1e-9:
                best, improved = misfit, True
                found.update(fields)
    for field in pins:  # those that make no difference
        rest = {k: v for k, v in found.items() if k != field}
        built = _built(model, config, rest)
        if built is not None and _misfit(model, built, base) <= best:
            found = rest
    _write(model, config, found)
    return found


def take_configuration(model: nn.Module, like: nn.Module) -> None:
    """Give a model copies of the configurations of another one of the same modules."""
    copied: dict[int, Any] = {}  # what modules share stays shared
    for module, other in zip(model.modules(), like.modules(), strict=True):
        if "config" in vars(other):
            module.config = copy.deepcopy(other.config, copied)


def has_config(model: nn.Module) -> bool:
    """Tell whether a model has a configuration that it is built from, as those of transformers."""
    return hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "save_pretrained")


def _steps(config: Any, options: Sequence[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """List changes to try: single fields, then two in one ratio (a width with its heads)."""
    yield from ({field: value} for field, value in options)
    pairs = (
        {one: a, two: b}
        for (one, a), (two, b) in combinations(options, 2)
        if one != two and a * (getattr(config, two) or 0) == b * (getattr(config, one) or 0)
    )
    yield from islice(pairs, PAIRS)


def _write(model: nn.Module, config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of a configuration, and of the copies that modules hold."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for field, value in fields.items():
        old = getattr(config, field, None)
        for other in configs.values():
            if getattr(other, field, None) == old:
                setattr(other, field, value)


def _options(
    config: Any, model: nn.Module, changes: set[tuple[int, int]]
) -> Iterator[tuple[str, Any]]:
    """List values that a field may have now: those of sizes that were what the field says."""
    ratios = sorted({new / old for old, new in changes})
    sizes = sorted({new for _, new in changes})
    names = {name for module in model.modules() for name in vars(module)}
    for field, value in sorted(config.to_dict().items()):
        if type(value) is int:
            yield from ((field, new) for old, new in sorted(changes) if old == value)
        elif type(value) is float and value >= 1:
            yield from ((field, value * ratio) for ratio in ratios)
        elif value is None and (field in names or any(word in field for word in WORDS)):
            yield from ((field, new) for new in sizes)


def _pins(config: Any, model: nn.Module) -> dict[str, int]:
    """List sizes that all modules agree on, and that the configuration leaves to be computed.

    Such as the width of heads, which is the model's divided by their number unless it is said.
    """
    known: dict[str, set[int]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is int and any(word in name for word in WORDS):
                known.setdefault(name, set()).add(value)
    alike = {name: values.pop() for name, values in sorted(known.items()) if len(values) == 1}
    return {k: v for k, v in alike.items() if getattr(config, k, None) is None}


def _built(model: nn.Module, config: Any, fields: Mapping[str, Any]) -> nn.Module | None:
    """Build a model without memory from a configuration with some fields changed, if it can be."""
    changed = copy.deepcopy(config)
    try:
        for field, value in fields.items():
            setattr(changed, field, value)
        with torch.device("meta"):
            return type(model)(changed)
    except Exception:  # the model refuses such a configuration
        return None


def _misfit(model: nn.Module, built: nn.Module, base: nn.Module) -> float:
    """Measure how far a model lies from one that was built; infinite where that computes otherwise.

    What is computed when a model is built, and not saved, would be another: frequencies of
    rotary embeddings, factors such as the scale of attention. `base` has those of the model.
    """
    before = dict(base.named_modules())
    total = 0.0
    for path, module in built.named_modules():
        if path not in before or _recomputed(module) != _recomputed(before[path]):
            return float("inf")
    old, new = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (built, model))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name].dim() != new[name].dim():
            total += 100.0
            continue
        pairs = zip(old[name].shape, new[name].shape, strict=True)
        total += sum(abs(log(max(n, 1) / max(m, 1))) for n, m in pairs)
    modules = dict(built.named_modules())
    for path, module in model.named_modules():
        total += 1e-3 * _different(vars(module), vars(modules.get(path, module)))
    return total


def _recomputed(module: nn.Module) -> dict[str, Any]:
    """List what a module computes when it is built: factors, and shapes of buffers not saved."""
    found: dict[str, Any] = {k: v for k, v in vars(module).items() if type(v) is float}
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(name)
        found[name] = None if buffer is None else tuple(buffer.shape)
    return found


def _different(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    """Count the whole numbers that two modules hold under one name, and that differ."""
    return sum(
        type(value) is int and name in second and second[name] != value
        for name, value in first.items()
    )
