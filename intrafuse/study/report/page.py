"""The report: one self-contained HTML file from the records in folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from intrafuse.study.report.kinds import KINDS
from intrafuse.study.report.read import Entry, read_entries, reading
from intrafuse.support.errors import printable
from intrafuse.support.extras import import_extra
from intrafuse.support.files import folder_target, replacing
from intrafuse.support.version import __version__

__all__ = ["draw_pictures", "write_report"]

FACTS = {"model": "network", "data": "data", "images": "images", "weights_sha256": "weights"}


@dataclass(frozen=True)
class _Drawn:
    """A picture on the page."""

    id: str
    title: str
    alternative: str
    svg: str


@dataclass(frozen=True)
class _Section:
    """A record on the page."""

    id: str
    title: str
    facts: str
    entry: Entry
    pictures: tuple[_Drawn, ...]


def write_report(
    paths: Sequence[str | Path], out: str | Path, *, title: str = "intrafuse report"
) -> Path:
    """Write one self-contained page with all records in folders.

    Args:
        paths: folders with records (written by `--json FILE`) and saved networks, or single files.
        out: the HTML file.
        title: title of the page.

    Returns:
        The file.

    Raises:
        IntrafuseError: there are no records, a record is broken, the extra `plots` is not
            installed, or the file cannot be written.
    """
    jinja = import_extra("jinja2", "plots")
    sections = [_section(i, entry) for i, entry in enumerate(read_entries(paths), 1)]
    source = files("intrafuse.study.report").joinpath("page.html").read_text("utf-8")
    settings: Any = {"autoescape": True, "trim_blocks": True, "finalize": _shown}
    template = jinja.Environment(**settings).from_string(source)
    text = template.render(title=title, version=__version__, sections=sections)
    with replacing(Path(out)) as temporary:
        temporary.write_text(text, "utf-8")
    return Path(out)


def draw_pictures(paths: Sequence[str | Path], out: str | Path, *, form: str = "png") -> list[Path]:
    """Write all pictures of the records in folders to files.

    Args:
        paths: as for `write_report`.
        out: folder for the pictures.
        form: png, svg or pdf.

    Returns:
        The files, named after the record and the picture.

    Raises:
        IntrafuseError: as for `write_report`.
    """
    written: dict[str, Path] = {}
    folder_target(out)
    for entry in read_entries(paths):
        for picture in entry.pictures:
            named, again = f"{picture.name}-".startswith(f"{entry.name}-"), 2
            name = first = picture.name if named else f"{entry.name}-{picture.name}"
            while name in written:  # records with the same name in two folders
                name, again = f"{first}-{again}", again + 1
            with reading(entry.source):
                written[name] = picture.write(Path(out) / f"{name}.{form}")
    return list(written.values())


def _shown(value: Any) -> Any:
    """Escape control characters in plain text; pictures pass unchanged."""
    return printable(value) if type(value) is str else value


def _section(number: int, entry: Entry) -> _Section:
    name = f"section-{number}"
    drawn = []
    for i, picture in enumerate(entry.pictures, 1):
        key = f"{name}-picture-{i}"
        with reading(entry.source):
            svg = picture.svg(key)
        drawn.append(_Drawn(key, picture.title, picture.alternative, svg))
    title = KINDS[entry.kind].title
    title = title if entry.name == entry.kind else f"{title}: {entry.name}"
    recipe = entry.record.get("recipe")
    told = {**(recipe if isinstance(recipe, dict) else {}), **entry.record}
    known = {label: told.get(key) for key, label in FACTS.items()}
    known["weights"] = str(known["weights"] or "")[:12]
    facts = [f"{label} {value}" for label, value in known.items() if value]
    facts = ", ".join([*facts, f"from {entry.source}"])
    return _Section(name, title, f"{facts[0].upper()}{facts[1:]}.", entry, tuple(drawn))
