"""The scripts in examples/ run, and their pages show the same code and what it prints."""

from __future__ import annotations

import io
import re
import runpy
from contextlib import redirect_stdout

import pytest
import torch
from doc_blocks import PAGES, ROOT, blocks

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
TOLERANCE = 5.0  # points of accuracy: processors round differently, and so do numbers of threads


def figures(text: str) -> dict[str, float]:
    """Read lines such as `moment: 97.1 %`."""
    lines = re.findall(r"^([^\n]+): ([\d.]+) %$", text, re.MULTILINE)
    return {name: float(number) for name, number in lines}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs_and_its_page_shows_it(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"examples/{script.name}"
    (page,) = (page for page in PAGES if f"<!-- from {name} -->" in page.read_text())
    code, position = script.read_text(), 0
    for block in blocks(page):
        if block.source == name:
            start = code.index(block.text, position)
            assert position == 0 or code[position:start].strip() == ""  # first a docstring
            position = start + len(block.text)
    assert code[position:].strip() == ""
    printed = io.StringIO()
    with torch.random.fork_rng(), redirect_stdout(printed):
        runpy.run_path(str(script), run_name="__main__")
    (shown,) = (block.text for block in blocks(page) if block.language == "text")
    found = figures(printed.getvalue())
    assert list(figures(shown)) == [line for line in found if line in figures(shown)]
    for line, number in figures(shown).items():
        assert abs(found[line] - number) <= TOLERANCE, (line, found[line], number)
