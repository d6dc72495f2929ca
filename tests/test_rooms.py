"""The house: rooms stand in the order of the pipeline, and files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import intrafuse

PACKAGE = Path(intrafuse.__file__).parent
ROOMS = (
    *("support", "catalog", "graph", "surgery", "sweep", "importance", "moments", "methods"),
    *("allocation", "pruning", "fusing", "checkpoint", "study", "cli"),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def documentation(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's docstring."""
    first = function.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=name)
def test_a_room_imports_itself_and_rooms_above_it(path):
    room = path.relative_to(PACKAGE).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for module in imported(ast.parse(path.read_text())):
        package, _, rest = module.partition(".")
        if package == "intrafuse":
            # the command line is a user: it takes public names from the package itself
            assert rest.partition(".")[0] in allowed or (room == "cli" and not rest), module


def test_every_folder_is_a_room():
    assert {p.relative_to(PACKAGE).parts[0] for p in FILES if p.parent != PACKAGE} == {*ROOMS}
    assert {p.name for p in FILES if p.parent == PACKAGE} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 - documentation(node) <= 60, node.name
