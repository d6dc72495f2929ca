"""The manifest of a saved network, `intrafuse.json`: its fields, reading and writing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.reading import parse_json, read_text

__all__ = [
    "CONFIG",
    "MANIFEST",
    "PLAN",
    "RECIPE",
    "SCHEMA",
    "Data",
    "Manifest",
    "Stored",
    "as_json",
    "signed",
]

MANIFEST, PLAN, RECIPE = "intrafuse.json", "plan.safetensors", "recipe.yaml"  # files of a folder
CONFIG = "config.json"  # of a checkpoint of transformers

SCHEMA = 2  # version 1, which can still be read, has no digest
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Stored(Data):
    """One parameter or buffer in a saved network.

    Attributes:
        shape: the sizes of its axes.
        dtype: the dtype, such as `float32`.
        pruned_axes: the axes that may be smaller than in the architecture.
        order: the axes from the largest to the smallest stride; None if they are in order.
    """

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    pruned_axes: tuple[NonNegativeInt, ...] = ()
    order: tuple[NonNegativeInt, ...] | None = None


class Manifest(Data):
    """The contents of a folder, and the settings that made it.

    Attributes:
        schema_version: the version of this format.
        architecture: a name in the zoo, or the user's name of the network; never imported.
        arguments: the arguments of the architecture's factory.
        tensors: every parameter and buffer; tied ones under their first name.
        aliases: the other names of tied parameters -> the name in `tensors`.
        attributes: sizes that modules hold as attributes: {module: {attribute: value}}.
        removed_layers: modules that `nn.Identity` replaces.
        budget, method, importance, include, exclude, seed: the requested settings of the pruning.
        before, after: channels, parameters and multiply-accumulates.
        seconds: time for planning and surgery.
        figures: measured figures, such as accuracy.
        source_sha256: SHA-256 of the weights file before pruning.
        files: SHA-256 of the files beside the manifest.
        versions: versions of Python and of the packages that wrote the folder.
        digest: SHA-256 of all other fields, so that any change is detected.
    """

    schema_version: int
    architecture: str | None = None
    arguments: dict[str, JsonValue] = {}
    tensors: dict[str, Stored]
    aliases: dict[str, str] = {}
    attributes: dict[str, dict[str, int]] = {}
    removed_layers: tuple[str, ...] = ()
    budget: dict[str, JsonValue] | None = None
    method: dict[str, JsonValue] | None = None
    importance: str | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    seed: int | None = None
    before: dict[str, int] | None = None
    after: dict[str, int] | None = None
    seconds: float | None = None
    figures: dict[str, JsonValue] = {}
    source_sha256: Digest | None = None
    files: dict[str, Digest]
    versions: dict[str, str]
    digest: Digest | None = None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            IntrafuseError: the file is missing, truncated, corrupt, or of another schema version.
        """
        try:
            text = read_text(path)
            data = parse_json(text)
        except OSError as error:
            raise IntrafuseError(
                f"the manifest cannot be read ({error.strerror})",
                value=str(path),
                remedy="name a folder that intrafuse saved; load_weights reads weights alone",
            ) from error
        except ValueError as error:
            raise _corrupt(path, str(error)) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int:
            raise _corrupt(path, "it holds no schema_version")
        if not 1 <= version <= SCHEMA:
            raise IntrafuseError(
                f"the manifest must have schema version {SCHEMA}",
                value=version,
                layer=str(path),
                remedy="upgrade intrafuse" if version > SCHEMA else "save the network again",
            )
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _corrupt(path, f"{where}: {first['msg']}") from error
        if manifest.digest != (signed(data)["digest"] if version > 1 else None):
            raise _corrupt(path, "its digest differs: it was changed after it was written")
        return manifest

    def text(self) -> str:
        """Write the manifest as JSON, without fields that are None, and with its digest."""
        return json.dumps(signed(self.model_dump(mode="json", exclude_none=True)), indent=1) + "\n"


def signed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add the digest of all other fields to a manifest's data.

    >>> data = signed({"schema_version": 2})
    >>> len(data["digest"]), signed(data) == data, signed({**data, "seed": 1}) == data
    (64, True, False)
    """
    others = {name: value for name, value in data.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
    return {**others, "digest": digest}


def as_json(value: Any, argument: str) -> Any:
    """Turn a value into plain JSON data; tuples become lists.

    Raises:
        IntrafuseError: the value holds something that JSON cannot hold, such as NaN or a tensor, or
            that `parse_json` refuses.

    >>> as_json({"hidden": (4, 2)}, "arguments")
    {'hidden': [4, 2]}
    """
    try:
        return parse_json(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise IntrafuseError(f"{argument} must be plain JSON data ({error})") from error


def _corrupt(path: Path, reason: str) -> IntrafuseError:
    return IntrafuseError(
        f"the manifest is truncated or corrupt ({reason})",
        value=str(path),
        remedy="save the network again",
    )
