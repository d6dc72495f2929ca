"""The command line on streams that are full or closed, when it is interrupted, and told to exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import run_main

import intrafuse
from intrafuse.catalog.zoo import resolve_model
from intrafuse.study.demo import run_demo

ROOT = Path(intrafuse.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
CLOSED = "standard output is closed. Remedy: send it to /dev/null"
FULL = "the output cannot be written: No space left on device"

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made = resolve_model("mlp")
    pruned = intrafuse.prune(made.model, made.example_inputs, channels=0.5)
    intrafuse.save(folder / "net", pruned, architecture="mlp")
    return folder


# --- streams ------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("line", "out", "err", "code", "message"),
    [
        ("--version", "/dev/full", "", 1, FULL),
        ("--help", "/dev/full", "", 1, FULL),
        ("report DIR --json -", "/dev/full", "", 1, FULL),
        ("evaluate DIR/net", "/dev/full", "", 1, FULL),
        ("evaluate DIR/net --json -", "", "/dev/full", 0, ""),
        ("--version", "closed", "", 1, CLOSED),
        ("evaluate DIR/net", "closed", "", 1, CLOSED),
        ("--version", "closed", "closed", 1, ""),
        ("--version", "closed", "/dev/full", 1, ""),
        ("nothing", "", "closed", 2, ""),
        ("report DIR", "", "closed", 0, ""),
        ("report DIR", "", "/dev/full", 0, ""),
        ("prune mlp --channels 0.5", "/dev/null", "/dev/full", 0, ""),
        ("report DIR/none", "", "/dev/full", 2, ""),
    ],
)
def test_streams_that_take_nothing(saved, line, out, err, code, message):
    done = run_main(*line.replace("DIR", str(saved)).split(), out=out, err=err)
    said = f"intrafuse: error: {message}\n".encode() if message else b""
    found = done.stderr if message else b""  # what else is said is no error
    assert (done.code, found) == (code, said)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--version > /dev/full", 1, FULL),
        ("--version >&-", 1, CLOSED),
        ("--version >&- <&-", 1, CLOSED),
        ("--version >&- 2>&-", 1, ""),
        ("--version <&- 2>&-", 0, ""),
        ("--version 2> /dev/full", 0, ""),
    ],
)
def test_a_shell_that_closes_streams(line, code, said):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m intrafuse {line}"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr == (f"intrafuse: error: {said}\n" if said else "")


def test_a_terminal_that_knows_no_other_letters_gets_escapes(saved):
    done = run_main("evaluate", str(saved / "net"), encoding="latin-1")
    assert done.code == 0 and rb"\u2501" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize(
    "line",
    [
        *("NAME", "inspect NAME", "inspect mlp --NAME", "inspect mlp NAME", "report NAME"),
        *("inspect mlp --threads NAME", "inspect mlp --weights NAME", "evaluate NAME"),
        *("prune mlp --channels 0.5 --exclude NAME", "inspect mlp --json FILE/NAME"),
        *("prune mlp --channels 0.5 --out FILE/NAME", "report DIR --out FILE/NAME"),
    ],
)
def test_no_error_sends_a_terminal_what_it_obeys(saved, line):
    name = b"a\xff\x1b[31m"
    places = {b"NAME": name, b"FILE": bytes(saved / "net" / "intrafuse.json"), b"DIR": bytes(saved)}
    words = line.encode()
    for place, value in places.items():
        words = words.replace(place, value)
    done = run_main(*words.split())
    text = done.stderr.decode()  # every character is whole
    assert done.code in (1, 2) and "error" in text.lower() and "Traceback" not in text
    assert all(c.isprintable() or c == "\n" for c in text)


NAMED = """
import torch
from torch import nn

def build():
    net = nn.Sequential()
    net.add_module("a\x1b[31m", nn.Linear(4, 8))
    net.add_module("relu", nn.ReLU())
    net.add_module("b", nn.Linear(8, 2))
    return net

def leaves():
    raise SystemExit

class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        raise SystemExit("enough")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "named.py").write_text(NAMED)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("named", None)


def test_tables_show_names_of_layers_as_escapes(factories):
    done = run_main("inspect", "named:build", "--input-shape", "4")
    assert done.code == 0 and b"\x1b" not in done.stdout and rb"a\x1b[31m" in done.stdout
    out = os.fsencode(factories / "out\x1b[31m")
    done = run_main(*"prune named:build --input-shape 4 --channels .5 --out".split(), out)
    assert done.code == 0 and b"\x1b" not in done.stdout + done.stderr
    assert rb"out\x1b[31m" in done.stderr and os.path.isdir(out)


@pytest.mark.parametrize(
    "line",
    [
        *("prune mlp --channels .5 --out", "demo --out", "factorize whole mlp --out"),
        *("report DIR --out", "plot DIR --out", "inspect mlp --json"),
    ],
)
@pytest.mark.parametrize("kind", ["loop of links", "long name", "below a file"])
def test_outputs_that_cannot_be_are_refused_at_once(saved, tmp_path, line, kind):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    names = {"loop of links": "loop", "long name": "n" * 300, "below a file": "file/x"}
    before = sorted(tmp_path.rglob("*"))
    done = run_main(*line.replace("DIR", str(saved)).split(), str(tmp_path / names[kind]))
    assert done.code == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"intrafuse: error: the output cannot be written: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_refuses_its_folder_before_it_trains(tmp_path):
    steps = []
    (tmp_path / "file").touch()
    with pytest.raises(intrafuse.IntrafuseError, match="it is a file"):
        run_demo(tmp_path / "file", progress=lambda *step: steps.append(step))
    assert steps == []


# --- exit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("builtins:exit", "got exit(None)"),
        ("named:leaves", "got exit(None)"),
        ("named:Leaving", "got exit('enough')"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune --channels .5"])
def test_a_network_that_exits_has_failed(factories, name, told, command):
    done = run_main(*command.split(), name, "--input-shape", "4")
    assert done.code == 1 and done.stdout == b""
    assert done.stderr.decode().endswith(
        f"intrafuse: error: the network's own code ended the program; {told}\n"
    )


# --- interrupts ---------------------------------------------------------------------------------

SLOW = """
import pathlib, time
pathlib.Path("started").touch()
try:
    time.sleep(60)
except BaseException:
    raise ImportError("half imported")
"""


@pytest.mark.parametrize("name", ["typer", "torch"])
def test_an_interrupt_while_importing_is_quiet(tmp_path, interrupted, name):
    (tmp_path / f"{name}.py").write_text(SLOW)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "intrafuse", "inspect", "mlp"]
    assert interrupted(command, environment) == (130, b"", b"")


def test_an_ignored_interrupt_stays_ignored():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); from intrafuse.__main__ import "
    code += "main; import sys; sys.argv = ['intrafuse', '--version']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("intrafuse ")
