"""The result of a factorized training: records of stages, bytes moved, and a JSON file."""

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
    """The times, sizes and accuracies of a factorized training.

    Attributes:
        scheme: whole, paf or fap.
        workers: `local` or `ray`; None without workers.
        parallel: number of workers at once.
        threads: threads of each worker; without workers, of this process.
        records: records of all stages, in order of their parts.
        sent, received: bytes sent to the workers (recipe and positions), and received from them
            (networks).
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
        """Seconds with one machine per part: the slowest part, plus the joint stages."""
        return max(self.parts.values(), default=0.0) + sum(
            record.seconds for record in self.records if record.part == 0
        )

    @property
    def parts(self) -> dict[int, float]:
        """Seconds of each part."""
        seconds: dict[int, float] = {}
        for record in self.records:
            if record.part:
                seconds[record.part] = seconds.get(record.part, 0.0) + record.seconds
        return seconds

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the final network in percent."""
        return self.records[-1].accuracy if self.records else None

    def record(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return all fields and the recipe as JSON data."""
        stages = [{**asdict(record), "seconds": record.seconds} for record in self.records]
        figures = {"seconds": self.seconds, "accuracy": self.accuracy}
        return {**asdict(self), "records": stages, **figures, "recipe": dict(recipe)}

    def __str__(self) -> str:
        (table,) = tables(self.record({}))
        return text_table(table.title, table.header, table.texts, table.numbers)


def write_result(result: Result, recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the result and the recipe to `result.json`, and return its content."""
    record = as_record("factorized", result.record(recipe))
    write_record(folder / RESULT, record)
    return record


def read_result(folder: Path) -> Result:
    """Read `result.json` of a folder.

    Raises:
        IntrafuseError: the file is missing or broken.
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
