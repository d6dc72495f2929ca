"""The manifest of a saved network: `intrafuse.json`, what it says and how it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.reading import parse_json, read_text

__all__ = ["SCHEMA", "Manifest", "Stored", "as_json", "signed"]

SCHEMA = 2  # 1, which is read as well, had no digest
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Stored(_Data):
    """Describe one parameter or buffer.

    Attributes:
        shape: the sizes of its axes.
        dtype: its type, such as `float32`.
        pruned_axes: where it may be smaller than the architecture makes it.
        order: its axes from the largest stride to the smallest, unless that is their own order.
    """

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    pruned_axes: tuple[NonNegativeInt, ...] = ()
    order: tuple[NonNegativeInt, ...] | None = None


class Manifest(_Data):
    """Say what a folder holds, and how it came to be.

    Attributes:
        schema_version: the version of this format.
        architecture: a name in the zoo, or what the user calls the network; never imported.
        arguments: what the architecture's factory was called with.
        tensors: every parameter and buffer; tied ones under their first name.
        aliases: the other names of tied parameters -> the name in `tensors`.
        attributes: sizes that modules hold as attributes: {module: {attribute: value}}.
        removed_layers: modules that `nn.Identity` stands for.
        budget, method, importance, include, exclude, seed: what the pruning was asked for.
        before, after: channels, parameters and multiply-accumulates.
        seconds: time for planning and surgery.
        figures: what was measured, such as accuracy.
        source_sha256: of the file with the weights before pruning.
        files: SHA-256 of the files beside the manifest.
        versions: of Python and the packages that wrote the folder.
        digest: SHA-256 of all the others, so that a change of any is found.
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
                remedy="give a folder that intrafuse saved; weights alone go to load_weights",
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
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _corrupt(path, f"{where}: {first['msg']}") from error
        if found.digest != (signed(data)["digest"] if version > 1 else None):
            raise _corrupt(path, "its digest differs: it was changed after it was written")
        return found

    def text(self) -> str:
        """Write the manifest as JSON, without what is absent, and with its digest."""
        return json.dumps(signed(self.model_dump(mode="json", exclude_none=True)), indent=1) + "\n"


def signed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Give a manifest's data the digest of all that they say.

    >>> data = signed({"schema_version": 2})
    >>> len(data["digest"]), signed(data) == data, signed({**data, "seed": 1}) == data
    (64, True, False)
    """
    told = {name: value for name, value in data.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return {**told, "digest": digest}


def as_json(value: Any, argument: str) -> Any:
    """Turn a value into plain JSON data; tuples become lists.

    Raises:
        IntrafuseError: it holds something that JSON cannot, such as NaN or a tensor, or that
            `parse_json` would refuse.

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
