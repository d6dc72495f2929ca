"""The recipe of a factorised training: one file that says everything that decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from intrafuse.study.training import PRESETS, Training
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra
from intrafuse.support.files import replacing
from intrafuse.support.recipes import read_mapping

__all__ = ["Fusing", "Pruning", "Recipe", "Splits", "make_recipe", "read_recipe", "write_recipe"]

Scheme = Literal["whole", "paf", "fap"]
MOST_FOLDS = 12  # of k-fold, which makes a network of every half of them
MOST_STEPS = 1000


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Splits(_Settings):
    """How the training images are split into parts, one for each network.

    Attributes:
        scheme: `disjoint`: k parts of equal size. `k-fold`: every union of k/2 of k subsets, for
            even k (Theus et al., section 6.2). `overlapping`: as disjoint, and every part also
            holds images of others. `dirichlet`: the classes are shared out unevenly (Hsu et al.,
            arXiv 1909.06335). `files`: positions from files. `places`: every worker reads a data
            set of its own.
        folds: k.
        overlap: share of every part that is drawn from the other parts.
        alpha: of the Dirichlet distribution; the smaller, the more uneven.
        files: of positions, .npy or text with one in a line, for each part; or for `places` the
            SPEC of each data set, as its worker sees it.
    """

    scheme: Literal["disjoint", "k-fold", "overlapping", "dirichlet", "files", "places"] = (
        "disjoint"
    )
    folds: int = Field(default=2, ge=2)
    overlap: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=0.5, gt=0)
    files: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Splits:
        if self.scheme == "k-fold" and self.folds % 2:
            raise ValueError("k-fold needs an even number of folds")
        if self.scheme == "k-fold" and self.folds > MOST_FOLDS:
            raise ValueError(f"k-fold takes {MOST_FOLDS} folds at most, which make 924 parts")
        if (self.scheme in ("files", "places")) != bool(self.files):
            raise ValueError("files belong to the schemes files and places, which need them")
        if self.files and len(self.files) < 2:
            raise ValueError("two parts or more are needed")
        if self.overlap and self.scheme != "overlapping":
            raise ValueError("overlap belongs to the scheme overlapping")
        if self.overlap > 1 - 1 / self.folds:
            raise ValueError(f"overlap can be {1 - 1 / self.folds:.3g} at most with these folds")
        if self.alpha != 0.5 and self.scheme != "dirichlet":
            raise ValueError("alpha belongs to the scheme dirichlet")
        return self


class Pruning(_Settings):
    """How networks are pruned.

    Attributes:
        channels: share removed from every group in all.
        method, importance, exclude: as for `intrafuse.prune`.
        steps: in so many prunings of equal ratio, each with a fine-tuning of its own.
    """

    channels: float = Field(default=0.5, ge=0, lt=1)
    method: str = "intra-fusion"
    importance: str = "l1"
    exclude: tuple[str, ...] = ()
    steps: int = Field(default=1, ge=1, le=MOST_STEPS)

    @property
    def share(self) -> float:
        """The share that one step removes of what is there."""
        return 1 - (1 - self.channels) ** (1 / self.steps)


class Fusing(_Settings):
    """How networks are fused: settings of `intrafuse.fuse`.

    Attributes:
        features: `auto` takes activations where the data may be read, else weights.
        samples: images that activations are compared on.
        repair: `auto` takes `batchnorm` where the data may be read, else `analytic`.
    """

    method: Literal["ot", "assignment", "moment"] = "ot"
    features: Literal["auto", "weights", "activations"] = "auto"
    samples: int = Field(default=200, ge=1)
    repair: Literal["auto", "none", "batchnorm", "synthetic", "analytic"] = "auto"


class Recipe(_Settings):
    """What to train, on what, and how it becomes one small network.

    Attributes:
        scheme: `whole`: train on everything, prune, fine-tune. `paf`: on every part train, prune,
            fine-tune; then fuse and fine-tune. `fap`: on every part train; then fuse, fine-tune,
            prune, fine-tune.
        model: a MODEL string, as on the command line.
        arguments: of its factory.
        data: SPEC of the data set.
        splits: how the data become parts.
        training, pruned, fused: how a network is trained at first, after each pruning, and after
            the fusion (`whole` has as many epochs more); or the name of a preset.
        pruning, fusing: how.
        private: the parts' images are read by their workers only. Then nothing is trained once
            networks are fused.
        seed: of everything random; network i starts from seed + i.

    >>> Recipe(scheme="fap", model="mlp", training="short").training.epochs
    10
    """

    scheme: Scheme
    model: str
    arguments: dict[str, JsonValue] = {}
    data: str = "digits"
    splits: Splits = Splits()
    training: Training = PRESETS["short"]
    pruned: Training = PRESETS["short-finetune"]
    fused: Training = PRESETS["short-finetune"]
    pruning: Pruning = Pruning()
    fusing: Fusing = Fusing()
    private: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("training", "pruned", "fused", mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ValueError(f"no preset {value!r}; there are {', '.join(PRESETS)}")
        return PRESETS[value]

    @field_validator("arguments")
    @classmethod
    def _of_factory(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in ("input_shape", "name"):
            if name in value:
                raise ValueError(f"{name} is no argument of a factory: model and data decide it")
        return value

    @model_validator(mode="after")
    def _closed(self) -> Recipe:
        joint = {"paf": (self.fused,), "fap": (self.fused, self.pruned), "whole": ()}
        if not self.open:
            if self.scheme == "whole":
                raise ValueError("whole reads all the data in one place, which private forbids")
            if any(settings.epochs for settings in joint[self.scheme]):
                raise ValueError(
                    "with private data no network can be trained once it is fused: set epochs of "
                    + ("fused to 0" if self.scheme == "paf" else "fused and pruned to 0")
                )
            if self.fusing.features == "activations" or self.fusing.repair == "batchnorm":
                raise ValueError("private data cannot be read to fuse: features or repair by it")
        return self

    @property
    def open(self) -> bool:
        """Whether the data may be read where networks are fused."""
        return not self.private and self.splits.scheme != "places"

    @property
    def digest(self) -> str:
        """A hash of all settings, by which a kept network tells what recipe made it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Check settings.

    Raises:
        IntrafuseError: names the first field that is wrong.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"] if first["loc"] else None
        raise IntrafuseError(
            f"the recipe is wrong at {where}: {message}", value=value, usage=True
        ) from error


def read_recipe(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file (or JSON, which is YAML).

    Args:
        path: of the file.
        changes: settings that take the place of the file's, nested like it.

    Raises:
        IntrafuseError: the file cannot be read, is no mapping, or holds a wrong setting.
    """
    found = read_mapping(path)
    changes = changes or {}
    defaults = {
        name: field.default.model_dump()
        for name, field in Recipe.model_fields.items()
        if name in changes and isinstance(field.default, BaseModel)
    }
    return make_recipe(_merged({**defaults, **found}, changes))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, with every setting."""
    yaml = import_extra("yaml", "recipes")
    text = yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested settings over others."""
    merged = dict(old)
    for key, value in new.items():
        below: Any = merged.get(key)
        if isinstance(below, str) and below in PRESETS:
            below = PRESETS[below].model_dump()
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged
