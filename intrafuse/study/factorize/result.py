"""What a factorised training took and gave: records of its stages, bytes moved, a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from intrafuse.study.factorize.stages import Record
from intrafuse.study.report.kinds.factorized import tables
from intrafuse.study.report.record import as_record, write_record
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.reading import read_json
from intrafuse.support.tables import text_table

__all__ = ["RESULT", "Result", "read_result", "write_result"]

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """What a factorised training took and gave.

    Attributes:
        scheme: whole, paf or fap.
        workers: `local` or `ray`; None where there are none.
        parallel: workers at once.
        threads: of each worker, and where the networks are fused.
        records: of all stages, in order of their parts.
        sent, received: bytes from and to where the networks are fused; what was sent is recipe
            and positions, what was received are networks.
        wall: seconds of the call that finished the run.
    """

    scheme: str
    workers: str | None
    parallel: int
    threads: int
    records: tuple[Record, ...]
    sent: int
    received: int
    wall: float

    @property
    def seconds(self) -> float:
        """Time with one machine for each part: the slowest part, and then the joint stages."""
        return max(self.parts.values(), default=0.0) + sum(
            record.seconds for record in self.records if record.part == 0
        )

    @property
    def parts(self) -> dict[int, float]:
        """Seconds of every part."""
        found: dict[int, float] = {}
        for record in self.records:
            if record.part:
                found[record.part] = found.get(record.part, 0.0) + record.seconds
        return found

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the network at the end, in percent."""
        return self.records[-1].accuracy if self.records else None

    def record(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything, and the recipe, as JSON data."""
        stages = [{**asdict(record), "seconds": record.seconds} for record in self.records]
        figures = {"seconds": self.seconds, "accuracy": self.accuracy}
        return {**asdict(self), "records": stages, **figures, "recipe": dict(recipe)}

    def __str__(self) -> str:
        (table,) = tables(self.record({}))
        return text_table(table.title, table.header, table.texts, table.numbers)


def write_result(result: Result, recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the records and the recipe to `result.json`, and return what it holds."""
    record = as_record("factorized", result.record(recipe))
    write_record(folder / RESULT, record)
    return record


def read_result(folder: Path) -> Result:
    """Read `result.json` of a folder.

    Raises:
        IntrafuseError: there is none, or it is broken.
    """
    try:
        found = read_json(folder / RESULT)
        for stage in found["records"]:
            del stage["seconds"]
        known = {name: found[name] for name in Result.__dataclass_fields__}
        return TypeAdapter(Result).validate_python(known)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IntrafuseError(
            f"no finished run: {RESULT} cannot be read ({error})",
            value=str(folder),
            remedy="run the same recipe in this folder again",
        ) from error
