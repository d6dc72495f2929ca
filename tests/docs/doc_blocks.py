"""Read the blocks of code and the commands of a page in Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("intrafuse ", "make ", ".venv/bin/")
LANGUAGES = {"python", "bash", "text"}
NOTE = re.compile(r"<!-- (?P<what>not run:|from) (?P<said>.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        page: its file.
        line: of its first line of code, from 1 on.
        language: of its fence; `indented` where it has none.
        text: the code, without indentation.
        reason: why a test does not run it; None where one does.
        source: the script that it stands in, which a test of its own runs.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None = None
    source: str | None = None

    @property
    def commands(self) -> list[list[str]]:
        """Split the commands of a shell into words; without a fence, a formula is none."""
        if self.language == "indented" and not self.text.startswith(COMMANDS):
            return []
        joined = self.text.replace("\\\n", " ")
        found = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in found if words]


def blocks(page: Path) -> Iterator[Block]:
    """Give the blocks of a page in order."""
    lines = page.read_text().splitlines()
    note: dict[str, str] = {}
    i = 0
    while i < len(lines):
        start, line = i, lines[i]
        if line.startswith("```"):
            language, end = line[3:], "```"
            i = next(j for j in range(start + 1, len(lines)) if lines[j] == end)
            text = "\n".join(lines[start + 1 : i])
            yield Block(page, start + 2, language, text, **note)
        elif line.startswith("    ") and (start == 0 or not lines[start - 1]):
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ")):
                i += 1
            text = "\n".join(line[4:] for line in lines[start : i + 1])
            yield Block(page, start + 1, "indented", text, **note)
        i += 1
        if found := NOTE.fullmatch(line):
            note = {"reason" if found["what"] == "not run:" else "source": found["said"]}
        elif line:
            note = {}
