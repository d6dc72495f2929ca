"""The command line: the application and its entry point; one file for each command.

To add a command, write a file with a function and enter the function in `_COMMANDS`. Commands
import PyTorch inside their function, so that `--help` and `--version` are fast.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from intrafuse.cli import (
    ablation,
    compare,
    cost,
    demo,
    divergence,
    evaluate,
    factorize,
    fuse,
    inspect,
    landscape,
    prune,
    report,
    sensitivity,
)
from intrafuse.cli.options import add_command, discard, show_error
from intrafuse.support.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="intrafuse",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"intrafuse {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make a trained neural network smaller without its data."""


_COMMANDS = (
    *(inspect.inspect, prune.prune, compare.compare),
    *(fuse.fuse, factorize.factorize, evaluate.evaluate),
    *(divergence.divergence, landscape.landscape, sensitivity.sensitivity, ablation.ablation),
    *(cost.cost, report.report, report.plot, demo.demo),
)
for _command in _COMMANDS:
    add_command(app, _command)


def main() -> None:
    """Run the command line. Failures of standard output and error become one-line errors."""
    if sys.stderr is None:  # closed: no message is possible
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if sys.stdout is None:
        _fail("standard output is closed. Remedy: send it to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except OSError as error:
        discard(sys.stdout)
        what = error.filename or "the output cannot be written"  # stdout has no filename
        _fail(f"{what}: {error.strerror or error}")


def _fail(reason: str) -> NoReturn:
    show_error(reason)
    raise SystemExit(1)
