"""The report: one HTML file that needs nothing else, from the records of some folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import intrafuse
from intrafuse.data import import_extra
from intrafuse.files import replacing
from intrafuse.report.kinds import KINDS
from intrafuse.report.read import Entry, read_entries

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
    """Write one self-contained page with every record of some folders.

    Args:
        paths: folders with records (`--json FILE` of the commands) and saved networks, or files.
        out: the HTML file.
        title: of the page.

    Returns:
        The file.

    Raises:
        IntrafuseError: no records, a broken one, the extra `plots` is not installed, or the file
            cannot be written.
    """
    jinja = import_extra("jinja2", "plots")
    sections = [_section(i, entry) for i, entry in enumerate(read_entries(paths), 1)]
    source = files("intrafuse.report").joinpath("page.html").read_text("utf-8")
    template = jinja.Environment(autoescape=True, trim_blocks=True).from_string(source)
    text = template.render(title=title, version=intrafuse.__version__, sections=sections)
    with replacing(Path(out)) as temporary:
        temporary.write_text(text, "utf-8")
    return Path(out)


def draw_pictures(paths: Sequence[str | Path], out: str | Path, *, form: str = "png") -> list[Path]:
    """Write every picture of the records in some folders to files.

    Args:
        paths: as for `write_report`.
        out: folder for the pictures.
        form: png, svg or pdf.

    Returns:
        The files, named by the record and the picture.

    Raises:
        IntrafuseError: as for `write_report`.
    """
    written: dict[str, Path] = {}
    for entry in read_entries(paths):
        for picture in entry.pictures:
            stem, again = _stem(entry), 2
            name = first = (
                picture.name if picture.name.startswith(stem) else f"{stem}-{picture.name}"
            )
            while name in written:  # two records of one name, in two folders
                name, again = f"{first}-{again}", again + 1
            written[name] = picture.write(Path(out) / f"{name}.{form}")
    return list(written.values())


def _stem(entry: Entry) -> str:
    """Name a record by its file, or by the folder where the file's name is that of all."""
    source = entry.source
    return source.parent.name if entry.kind in ("pruning", "factorized") else source.stem


def _section(number: int, entry: Entry) -> _Section:
    name = f"section-{number}"
    drawn = []
    for i, picture in enumerate(entry.pictures, 1):
        key = f"{name}-picture-{i}"
        drawn.append(_Drawn(key, picture.title, picture.alternative, picture.svg(key)))
    title, stem = KINDS[entry.kind].title, _stem(entry)
    title = title if stem == entry.kind else f"{title}: {stem}"
    known = {label: entry.record.get(key) for key, label in FACTS.items()}
    known["weights"] = (known["weights"] or "")[:12]
    facts = ", ".join(f"{label} {value}" for label, value in known.items() if value)
    return _Section(name, title, f"{facts}. From {entry.source}.", entry, tuple(drawn))
