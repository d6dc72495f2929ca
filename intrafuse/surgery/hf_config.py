"""Update the configuration of a pruned Hugging Face model, so that it can be rebuilt.

A configuration holds one number for all layers. If the layers agree on a new size, the fields with
that number are changed, so that `save_pretrained` and `from_pretrained` restore the same network.
The meaning of each field is found by building the model from it on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from math import log
from typing import Any

import torch
from torch import nn

from intrafuse.graph.typed import named_modules

__all__ = ["follow_sizes", "has_config", "take_configuration", "take_fields"]

PAIRS = 40  # most pairs of fields to try together; each trial builds the model once
WORDS = ("dim", "size", "inner", "heads")  # parts of names of size fields that may be None


def follow_sizes(model: nn.Module, changes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Change the size fields of a model's configuration to fit the model.

    A field is changed if the model built from the configuration then comes closer to this one. Some
    sizes cannot be expressed: layers of different widths, or the heads of BERT, whose width is
    always the model's divided by their number. Their fields stay unchanged, and `from_pretrained`
    then refuses the weights because of their shapes; `intrafuse.load` accepts them.

    Args:
        model: a pruned model; without a configuration nothing happens.
        changes: pairs of sizes, before and after.

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
    chosen, best, improved = dict(pins), _misfit(model, base, base), True
    while best and improved:
        improved = False
        for fields in _steps(config, options):
            if improved and len(fields) > 1:
                break
            built = _built(model, config, {**chosen, **fields})
            misfit = float("inf") if built is None else _misfit(model, built, base)
            if misfit < best - 1e-9:
                best, improved = misfit, True
                chosen.update(fields)
    for field in pins:  # drop those that make no difference
        rest = {k: v for k, v in chosen.items() if k != field}
        built = _built(model, config, rest)
        if built is not None and _misfit(model, built, base) <= best:
            chosen = rest
    _write(model, config, chosen)
    return chosen


def take_configuration(model: nn.Module, like: nn.Module) -> None:
    """Copy the configurations of one model into another model with the same modules."""
    copied: dict[int, Any] = {}  # shared configurations stay shared
    for module, other in zip(model.modules(), like.modules(), strict=True):
        if "config" in vars(other):
            module.config = copy.deepcopy(other.config, copied)


def take_fields(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Set the numbers of a model's configuration that differ from those of a saved one."""
    config: Any = getattr(model, "config", None)
    numbers = {k: v for k, v in fields.items() if type(v) in (int, float) and hasattr(config, k)}
    _write(model, config, {k: v for k, v in numbers.items() if getattr(config, k) != v})


def has_config(model: nn.Module) -> bool:
    """Tell whether a model has a configuration, as models of transformers do."""
    return hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "save_pretrained")


def _steps(config: Any, options: Sequence[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """List changes to try: single fields, then pairs in one ratio (a width and its heads)."""
    yield from ({field: value} for field, value in options)
    pairs = (
        {one: a, two: b}
        for (one, a), (two, b) in combinations(options, 2)
        if one != two and a * (getattr(config, two) or 0) == b * (getattr(config, one) or 0)
    )
    yield from islice(pairs, PAIRS)


def _write(model: nn.Module, config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of a configuration and of its copies in modules."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for field, value in fields.items():
        old = getattr(config, field, None)
        for other in configs.values():
            if getattr(other, field, None) == old:
                setattr(other, field, value)


def _options(
    config: Any, model: nn.Module, changes: set[tuple[int, int]]
) -> Iterator[tuple[str, Any]]:
    """List candidate values of fields: new sizes for fields that hold the old size."""
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
    """List sizes on which all modules agree and that the configuration leaves unset.

    For example the width of heads: if unset, it is the model's width divided by their number.
    """
    known: dict[str, set[int]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is int and any(word in name for word in WORDS):
                known.setdefault(name, set()).add(value)
    alike = {name: values.pop() for name, values in sorted(known.items()) if len(values) == 1}
    return {k: v for k, v in alike.items() if getattr(config, k, None) is None}


def _built(model: nn.Module, config: Any, fields: Mapping[str, Any]) -> nn.Module | None:
    """Build a model on the meta device from a changed configuration; None if that fails."""
    changed = copy.deepcopy(config)
    try:
        for field, value in fields.items():
            setattr(changed, field, value)
        with torch.device("meta"):
            return type(model)(changed)
    except Exception:  # the model refuses such a configuration
        return None


def _misfit(model: nn.Module, built: nn.Module, base: nn.Module) -> float:
    """Measure how far the sizes of a model are from those of a built model.

    The result is infinite if the built model would compute something else, because values that
    are computed when a model is built, and not saved, differ: frequencies of rotary embeddings,
    or factors such as the scale of attention. `base` has those of the model.
    """
    before = dict(named_modules(base))
    total = 0.0
    for path, module in named_modules(built):
        if path not in before or _recomputed(module) != _recomputed(before[path]):
            return float("inf")
    old, new = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (built, model))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name].dim() != new[name].dim():
            total += 100.0
            continue
        pairs = zip(old[name].shape, new[name].shape, strict=True)
        total += sum(abs(log(max(n, 1) / max(m, 1))) for n, m in pairs)
    modules = dict(named_modules(built))
    for path, module in named_modules(model):
        total += 1e-3 * _different(vars(module), vars(modules.get(path, module)))
    return total


def _recomputed(module: nn.Module) -> dict[str, Any]:
    """List values that a module computes when built: factors, and shapes of unsaved buffers."""
    computed: dict[str, Any] = {k: v for k, v in vars(module).items() if type(v) is float}
    for name in sorted(module._non_persistent_buffers_set):  # pyright: ignore[reportPrivateUsage]
        buffer = module._buffers.get(name)  # pyright: ignore[reportPrivateUsage]
        computed[name] = None if buffer is None else tuple(buffer.shape)
    return computed


def _different(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    """Count the integer attributes that differ between two modules."""
    return sum(
        type(value) is int and name in second and second[name] != value
        for name, value in first.items()
    )
