"""Where outputs may go: through links, into pipes and devices, and nowhere else."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch import nn

import intrafuse
from intrafuse.study.report.record import write_record
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.files import replacing, replacing_folder

CODE = """
import sys
from pathlib import Path
from intrafuse.support.files import replacing
print("before", flush=True)
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("written")
print("after", flush=True)
"""


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_links_stay_and_what_they_lead_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to("far/file")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("far/none")
    for name, target in (("link", "file"), ("second", "file"), ("dangling", "none")):
        write(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / target).read_text() == name
    with replacing_folder(tmp_path / "dangling-folder") as temporary:
        (temporary / "x").touch()
    (tmp_path / "folder").symlink_to("dangling-folder")
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "y").touch()
    assert (tmp_path / "folder").is_symlink()
    assert [path.name for path in (tmp_path / "dangling-folder").iterdir()] == ["y"]
    assert not list(tmp_path.rglob(".*"))


def test_a_device_is_written_into(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("")
    except OSError:
        pytest.skip("devices cannot be made here")
    (tmp_path / "link").symlink_to(device)
    for path in (device, tmp_path / "link"):
        write_record(path, {"n": 1})
        assert stat.S_ISCHR(os.stat(device).st_mode) and os.stat(device).st_rdev == os.makedev(1, 3)
    os.unlink(device)
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # /dev/full
    with pytest.raises(IntrafuseError, match="cannot be written: No space left"):
        write_record(device, {"n": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "null"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_record(pipe, {"n": 1})
    reader.join()
    assert json.loads(found[0]) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and pipe.is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_what_is_open_already_is_written_into(tmp_path, name, to):
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    (tmp_path / "out").write_text("x" * 100)
    link = tmp_path / "link"
    link.symlink_to(name)
    for path in (name, link):
        with open(tmp_path / "out", "w") as out:
            child = subprocess.run(
                [sys.executable, "-c", CODE, path],
                stdout=out if to == "file" else subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(Path(intrafuse.__file__).parents[1])},
                check=True,
            )
        text = (tmp_path / "out").read_text() if to == "file" else child.stdout.decode()
        assert text == "before\nwrittenafter\n"
    assert Path("/dev/stdout").is_symlink()


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def bound(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "s"))
    return folder / "s"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("old")
    return folder / "file" / "below"


NAMES = {
    "loop of links": (loop, "Too many levels"),
    "long name": (lambda folder: folder / ("n" * 300), "name too long"),
    "long path": (lambda folder: folder.joinpath(*["n" * 200] * 30), "name too long"),
    "NUL": (lambda folder: folder / "a\0b", "null byte"),
    "surrogate": (lambda folder: folder / "a\ud800b", "surrogates"),
    "below a file": (below_a_file, "Not a directory"),
}


@pytest.mark.parametrize("case", [*NAMES, "folder", "socket"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, case):
    extra = {"folder": (lambda folder: folder, "a folder has"), "socket": (bound, "a socket")}
    name, message = {**NAMES, **extra}[case]
    path = name(tmp_path)
    before = sorted(tmp_path.iterdir())
    for writer in (write, lambda path: write_record(path, {})):
        with pytest.raises(IntrafuseError, match=message):
            writer(path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", [*NAMES, "unknown user", "file"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, case):
    extra = {
        "unknown user": (lambda folder: Path("~no-such-user/x"), "home directory"),
        "file": (lambda folder: below_a_file(folder).parent, "it is a file"),
    }
    name, message = {**NAMES, **extra}[case]
    path = name(tmp_path)
    before = sorted(tmp_path.iterdir())
    message = message.replace("Too many levels", "Too many levels|loop")
    for function in (lambda: intrafuse.save(path, nn.Linear(2, 2)), lambda: folder(path)):
        with pytest.raises(IntrafuseError, match=message):
            function()
    assert sorted(tmp_path.iterdir()) == before


def folder(path: Path) -> None:
    with replacing_folder(path):
        pass
