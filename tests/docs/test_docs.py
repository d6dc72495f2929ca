"""Every block of Python and every command in README and docs runs, or says why not."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from architectures import import_torchvision
from doc_blocks import LANGUAGES, PAGES, ROOT, Block, blocks
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import intrafuse
from intrafuse.catalog.zoo import resolve_model
from intrafuse.cli import app
from intrafuse.graph.rules import registry
from intrafuse.moments import propagate

STANDINS = Path(__file__).parent / "standins"
REASONS = {
    "needs a package registry",
    "needs CIFAR-10",
    "needs CIFAR-10, and a Ray cluster",
    "workers train for a minute",
    "the recipe is that of a run",
    "times networks for some seconds; tests/allocation/test_latency.py runs it",
    "tests/study/test_demo.py runs it",
    "FOLDER is what save_pretrained wrote; the tutorial runs these on a small model",
    "small is a pruned model, FOLDER the one before",
}
DOCS = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
BLOCKS = [block for page in PAGES for block in blocks(page)]


def place(value: Path | Block) -> str:
    """Name a page or a block."""
    if isinstance(value, Path):
        return str(value.relative_to(ROOT))
    return f"{place(value.page)}:{value.line}"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what stands for a reader's own folder: a module, weights and images."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(STANDINS / "my_project.py", folder)
    sys.path.insert(0, str(folder))
    try:
        network = importlib.import_module("my_project").MyNet()
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("my_project", None)
    torch.manual_seed(0)
    torch.save(network.state_dict(), folder / "my_net.pt")
    networks = {"my_net": network, "digits_resnet": resolve_model("digits_resnet").model}
    networks |= {f"mlp_{name}": resolve_model("mlp").model for name in "ab"}
    for name, model in networks.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    for split in ("train", "test"):
        for number, kind in enumerate(("cat", "dog")):
            images = folder / "my_images" / split / kind
            images.mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * number, 100, 0)).save(images / "1.png")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_the_blocks_of_a_page_run(page, project, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(project, here)
    monkeypatch.chdir(here)
    import_torchvision()  # transformers does
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))  # a page registers rules
    monkeypatch.setattr(propagate, "RULES", dict(propagate.RULES))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is not None or block.source is not None:
            continue
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # a traceback names the line of the page
            exec(compile(code, str(page), "exec"), namespace)
        elif block.language in ("bash", "indented"):
            for words in block.commands:
                if words[0] == "intrafuse":
                    result = CliRunner().invoke(app, words[1:])
                    assert result.exit_code == 0, (place(block), words, result.output)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=place)
def test_a_shell_block_runs_or_says_why_not(block):
    known = all(words[0] in ("intrafuse", "make") for words in block.commands)
    assert known or block.reason is not None
    for words in block.commands:
        check(words)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "indented"], ids=place)
def test_a_command_without_a_fence_exists(block):
    for words in block.commands:
        check(words)


def check(words: list[str]) -> None:
    """Hold a command against the options that there are, without running it."""
    if words[0] == "intrafuse":
        group = typer.main.get_command(app)
        assert words[1] in group.commands or words[1] in ("--help", "--version"), words
        if words[1] in group.commands and "--help" not in words:
            group.commands[words[1]].make_context(words[1], words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, words
    elif words[0] == ".venv/bin/python" or (words[0] == "python" and words[1] != "-m"):
        source = (ROOT / words[1]).read_text()
        options = [word.strip("[]") for word in words[2:] if word.strip("[").startswith("--")]
        assert all(f'"{option}"' in source for option in options), words


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason], ids=place)
def test_a_block_that_is_not_run_says_why_and_names_what_exists(block):
    assert len(block.reason.split()) > 1
    if block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("intrafuse"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_fences_name_their_language():
    named = {block.language for block in BLOCKS} - {"indented"}
    assert named <= LANGUAGES


def test_few_blocks_are_not_run_and_the_reasons_are_these():
    reasons = Counter(block.reason for block in BLOCKS if block.reason)
    assert set(reasons) == REASONS
    commands = [block for block in BLOCKS if block.language == "python" or block.commands]
    assert reasons.total() < len(commands) / 3


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_a_file_that_a_page_names_exists(page):
    """Paths of the repository in backticks, and links between pages."""
    text = page.read_text()
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|png))`", text)
    bases = (ROOT, ROOT / "intrafuse")
    assert [path for path in named if not any((base / path).exists() for base in bases)] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_names_every_public_name():
    text = (ROOT / "docs" / "reference" / "index.md").read_text()
    named = set(re.findall(r"^::: intrafuse\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    named |= set(re.findall(r"`(\w+)`", text))
    assert sorted(set(intrafuse.__all__) - named) == ["__version__"]


def test_every_page_stands_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in DOCS}
