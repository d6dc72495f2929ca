"""A figure is the same everywhere: README holds those of results.md and architectures.md."""

from __future__ import annotations

import re

import pytest
from doc_blocks import ROOT

FIGURE = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?![\w,])|(?<![\w.])\d+\.\d+(?![\w.])")
KNOWN = {"2402.07839", "3.11"}  # a paper, a version of Python
METHODS = ("select", "intra-fusion", "folding", "moment")


def read(name: str) -> str:
    """Read a page without blocks of code."""
    text = (ROOT / name).read_text()
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Read the cells of all rows of tables, without marks of emphasis and code."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip().strip("*`") for c in line.strip("|").split("|")] for line in lines]


def test_figures_of_the_readme_stand_in_the_results():
    told = set(FIGURE.findall(read("docs/results.md") + read("docs/architectures.md")))
    named = set(FIGURE.findall(read("README.md")))
    assert len(named) > 30
    assert sorted(named - told - KNOWN) == []


def test_rows_of_the_readme_stand_in_the_results():
    """The three figures of a row belong together."""
    told = {tuple(row[-3:]) for row in rows(read("docs/results.md"))}
    told |= {tuple(row[2:5]) for row in rows(read("docs/results.md"))}
    mine = [row for row in rows(read("README.md")) if len(FIGURE.findall(" ".join(row[-3:]))) == 3]
    assert len(mine) > 8
    assert [row for row in mine if tuple(cell.strip("*") for cell in row[-3:]) not in told] == []


def test_one_figure_is_told_for_the_architectures():
    tried, passed, refused = re.findall(
        r"(\d+) architectures: (\d+) pass, (\d+) refused", read("docs/architectures.md")
    )[0]
    readme = " ".join(read("README.md").split())
    assert f"{tried} architectures" in readme
    assert f"{passed} pass, {refused} are refused" in readme


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["vgg11_bn", "resnet18"])
def test_a_method_has_the_same_figures_in_every_table(network, method):
    """Tables of 30, 50 and 70 % of all groups of one network on all test images."""
    parts = read("docs/results.md").split("\n### ")[0].split("\n## ")
    found = set()
    for part in parts:
        if part.startswith(("Methods", "Moment matching")):
            for row in table_of(part, network):
                if row[1] == method or row[1].startswith(f"{method}` ("):
                    found.add(tuple(row[2:5]))
    assert len(found) == 1


def table_of(part: str, network: str) -> list[list[str]]:
    """Keep the rows that belong to a network, which stands in the first cell of its first row."""
    kept, mine = [], False
    for row in rows(part):
        if row[0]:
            mine = row[0].startswith(network)
        if mine and len(row) >= 5:
            kept.append(row)
    return kept
