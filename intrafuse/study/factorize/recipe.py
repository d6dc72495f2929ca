"""The recipe of a factorized training: one file with all settings that determine its result."""

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
MOST_FOLDS = 12  # k-fold trains a network on each choice of half the folds
MOST_STEPS = 1000


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Splits(_Settings):
    """Settings for splitting the training images into parts, one for each network.

    Attributes:
        scheme: `disjoint`: k parts of equal size. `k-fold`: every union of k/2 of k subsets, for
            even k (Theus et al., section 6.2). `overlapping`: disjoint parts, each with added
            images of other parts. `dirichlet`: classes are distributed unevenly (Hsu et al.,
            arXiv 1909.06335). `files`: positions from files. `places`: every worker reads its own
            data set.
        folds: the number k.
        overlap: share of each part that comes from other parts.
        alpha: parameter of the Dirichlet distribution; smaller is more uneven.
        files: one file of positions for each part, .npy or text with one number per line. For
            `places`: the SPEC of each data set, as its worker sees it.
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
            raise ValueError(f"k-fold takes at most {MOST_FOLDS} folds, which make 924 parts")
        if (self.scheme in ("files", "places")) != bool(self.files):
            raise ValueError("files must be set for, and only for, the schemes files and places")
        if self.files and len(self.files) < 2:
            raise ValueError("at least two parts are needed")
        if self.overlap and self.scheme != "overlapping":
            raise ValueError("overlap belongs to the scheme overlapping")
        if self.overlap > 1 - 1 / self.folds:
            raise ValueError(f"overlap can be at most {1 - 1 / self.folds:.3g} with these folds")
        if self.alpha != 0.5 and self.scheme != "dirichlet":
            raise ValueError("alpha belongs to the scheme dirichlet")
        return self


class Pruning(_Settings):
    """Settings of pruning.

    Attributes:
        channels: total share to remove from every group.
        method, importance, exclude: as for `intrafuse.prune`.
        steps: number of prunings of equal ratio, each followed by fine-tuning.
    """

    channels: float = Field(default=0.5, ge=0, lt=1)
    method: str = "intra-fusion"
    importance: str = "l1"
    exclude: tuple[str, ...] = ()
    steps: int = Field(default=1, ge=1, le=MOST_STEPS)

    @property
    def share(self) -> float:
        """The share of the present channels that one step removes."""
        return 1 - (1 - self.channels) ** (1 / self.steps)


class Fusing(_Settings):
    """Settings of fusing, as for `intrafuse.fuse`.

    Attributes:
        method: as for `intrafuse.fuse`.
        features: `auto` uses activations if the data may be read, else weights.
        samples: number of images to compare activations on.
        repair: `auto` uses `batchnorm` if the data may be read, else `analytic`.
    """

    method: Literal["ot", "assignment", "moment"] = "ot"
    features: Literal["auto", "weights", "activations"] = "auto"
    samples: int = Field(default=200, ge=1)
    repair: Literal["auto", "none", "batchnorm", "synthetic", "analytic"] = "auto"


class Recipe(_Settings):
    """Settings of a factorized training: data, training, pruning and fusing.

    Attributes:
        scheme: `whole`: train on all data, prune, fine-tune. `paf`: on each part train, prune and
            fine-tune; then fuse and fine-tune. `fap`: on each part train; then fuse, fine-tune,
            prune, fine-tune.
        model: a MODEL string, as on the command line.
        arguments: arguments of the model's factory.
        data: SPEC of the data set.
        splits: settings for splitting the data.
        training, pruned, fused: settings or preset of the first training, of fine-tuning after
            each pruning, and of fine-tuning after fusing. `whole` fine-tunes once more with
            `fused`.
        pruning, fusing: settings of pruning and fusing.
        private: True if only the workers may read the images. Then no network is trained after
            fusing.
        seed: seed of all random choices; part i uses seed + i.

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
            raise ValueError(f"no preset {value!r}; the presets are {', '.join(PRESETS)}")
        return PRESETS[value]

    @field_validator("arguments")
    @classmethod
    def _of_factory(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in ("input_shape", "name"):
            if name in value:
                raise ValueError(f"{name} cannot be set here: model and data determine it")
        return value

    @model_validator(mode="after")
    def _closed(self) -> Recipe:
        joint = {"paf": (self.fused,), "fap": (self.fused, self.pruned), "whole": ()}
        if not self.open:
            if self.scheme == "whole":
                raise ValueError("scheme whole reads all data in one place, which private forbids")
            if any(settings.epochs for settings in joint[self.scheme]):
                raise ValueError(
                    "with private data no network can be trained after fusing: set epochs of "
                    + ("fused to 0" if self.scheme == "paf" else "fused and pruned to 0")
                )
            if self.fusing.features == "activations" or self.fusing.repair == "batchnorm":
                raise ValueError("features and repair of fusing cannot read private data")
        return self

    @property
    def open(self) -> bool:
        """Whether the process that fuses networks may read the data."""
        return not self.private and self.splits.scheme != "places"

    @property
    def digest(self) -> str:
        """A hash of all settings, which a saved network stores to identify its recipe."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Build a recipe from settings.

    Raises:
        IntrafuseError: a setting is wrong; the message names the first wrong field.
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
    """Read a recipe from a YAML or JSON file.

    Args:
        path: path of the file.
        changes: settings that override those of the file, with the same nesting.

    Raises:
        IntrafuseError: the file cannot be read, is not a mapping, or holds a wrong setting.
    """
    settings = read_mapping(path)
    changes = changes or {}
    defaults = {
        name: field.default.model_dump()
        for name, field in Recipe.model_fields.items()
        if name in changes and isinstance(field.default, BaseModel)
    }
    return make_recipe(_merged({**defaults, **settings}, changes))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, with all settings."""
    yaml = import_extra("yaml", "recipes")
    text = yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Override nested settings by others."""
    merged = dict(old)
    for key, value in new.items():
        below: Any = merged.get(key)
        if isinstance(below, str) and below in PRESETS:
            below = PRESETS[below].model_dump()
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged
