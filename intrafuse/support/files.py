"""Write files and folders so that nothing half-written ever stands under the final name.

What is written is first made in a stage, a hidden folder beside the target:

    .intrafuse-RANDOM.tmp/lock       held while the writer lives: the kernel frees it at any death
    .intrafuse-RANDOM.tmp/new/NAME   what is written
    .intrafuse-RANDOM.tmp/old/NAME   a folder that stood under the name, between two renames

A file takes the place of another in one rename. A folder does so where Linux exchanges two names.
Elsewhere (macOS, network file systems) it takes two renames. Who dies between them leaves NAME in
both `old` and `new`, and the old one is put back by the next writer beside it and by the next
reader that looks for it. Links to versions would need no exchange, but a saved network is a plain
folder that can be copied and renamed. A stage whose lock is free belongs to a dead writer, and the
next writer removes it. Process numbers would not tell: they come again, also in other containers.
Where there are no locks, stages of the dead stay.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from intrafuse.support.errors import IntrafuseError

try:
    import fcntl
except ImportError:  # no locks on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["file_target", "folder_target", "put_back", "replacing", "replacing_folder", "sweep"]

PREFIX, SUFFIX = ".intrafuse-", ".tmp"
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path` once it is complete.

    Links are followed, and stay. A pipe and a device such as /dev/null are written into.

    Raises:
        IntrafuseError: the file cannot be written (no folder, no space, no permission), or what
            has its name can be neither replaced nor written into.
    """
    target = file_target(path)
    beside = target or Path(tempfile.gettempdir(), path.name)
    with _telling(path), _staging(beside) as stage:
        yield stage.new
        stage.flush(stage.new)
        if target is None:
            _write_into(path, stage.new)
        else:
            os.replace(stage.new, target)
            _flush_folder(target.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` once it is complete.

    A folder that stood under the name is replaced by the new one as a whole. Links are followed,
    and stay.

    Raises:
        IntrafuseError: the folder cannot be written, or `path` is a file.
    """
    target = folder_target(path)
    with _telling(path), _staging(target) as stage:
        stage.new.mkdir()
        yield stage.new
        for file in stage.new.iterdir():
            stage.flush(file)
        _flush_folder(stage.new)
        _install(stage, target)
        _flush_folder(target.parent)


def file_target(path: Path) -> Path | None:
    """Return the file that `replacing` replaces; None where it writes into a pipe or a device.

    Raises:
        IntrafuseError: something else has the name, or it can be the name of nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # a loop of links, too long, a NUL
        raise _cannot_write(path, error) from error
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _descriptor(path) is not None:
        return None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a socket or a disk"
        raise IntrafuseError(
            f"the output cannot be written: it must be a file, but {kind} has that name",
            value=str(path),
            remedy="choose another name",
        )
    return path.resolve()


def folder_target(path: str | Path) -> Path:
    """Return the folder that `replacing_folder` makes or replaces, and put it back where lost.

    Raises:
        IntrafuseError: a file has the name, or it can be the name of nothing.
    """
    try:
        found = Path(path).expanduser().resolve()
        put_back(found)
        mode = os.stat(found).st_mode
    except FileNotFoundError:
        return found
    except (OSError, RuntimeError, ValueError) as error:  # a loop, an unknown user, too long
        raise _cannot_write(Path(path), error) from error
    if not stat.S_ISDIR(mode):
        raise IntrafuseError(
            "the output must be a folder, but it is a file",
            value=str(path),
            remedy="choose another name",
        )
    return found


def put_back(path: Path) -> None:
    """Give a folder its name back where a writer that replaces it died between two renames.

    No lock is needed: a writer that lives sees what stands there, and replaces it again.
    """
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path):
        for stage in _stages(path.parent):
            with suppress(OSError):
                _return_old(stage)


def sweep(folder: Path) -> None:
    """Put back what dead writers in a folder had moved away, and remove what they left."""
    for stage in _stages(folder):
        with suppress(OSError):
            lock = _lock(stage)
            if lock is not None:
                try:
                    _return_old(stage)
                    shutil.rmtree(stage)
                finally:
                    os.close(lock)


# --- stages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """Where one writer works."""

    folder: Path
    name: str

    @property
    def new(self) -> Path:
        return self.folder / "new" / self.name

    @property
    def old(self) -> Path:
        return self.folder / "old" / self.name

    def flush(self, file: Path) -> None:
        """Bring a file to the disk, with the mode that the user's umask allows.

        Some libraries write private files. The umask of a process can be read only by changing
        it, which other threads would see; the lock was made under it.
        """
        file.chmod((self.folder / "lock").stat().st_mode & 0o777)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def _staging(target: Path) -> Iterator[_Stage]:
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    folder, lock = _new_stage(target.parent)
    stage = _Stage(folder, target.name)
    try:
        stage.new.parent.mkdir()
        yield stage
    finally:
        try:
            _return_old(folder)
        except OSError as error:
            raise IntrafuseError(
                f"the folder that is replaced cannot be moved back: {error.strerror}",
                value=str(stage.old),
                remedy=f"move it to {target}, or save or load there again",
            ) from error
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


def _new_stage(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
        with suppress(FileNotFoundError, BlockingIOError):  # swept before it was locked
            return folder, _lock(folder)


def _lock(stage: Path) -> int | None:
    """Lock a stage as long as a descriptor is open; None where the file system has no locks.

    Raises:
        BlockingIOError: its writer lives, or another sweep removes it.
    """
    path = stage / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise
    except OSError:
        pass
    os.close(lock)
    return None


def _stages(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(PREFIX)
                and entry.name.endswith(SUFFIX)
                and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def _install(stage: _Stage, target: Path) -> None:
    """Put the new folder under its name, whoever else does so at the same time."""
    while True:
        try:
            return os.rename(stage.new, target)  # nothing is there, or an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _exchange(stage.new, target):
            return
        if stage.old.exists():  # another writer has replaced this one
            os.rename(stage.old, tempfile.mkdtemp(dir=stage.folder))
        stage.old.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another writer has just moved it away
            os.rename(target, stage.old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system and the file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def _return_old(stage: Path) -> None:
    """Move back the folder that a stage holds, where nothing has taken its place."""
    with suppress(FileNotFoundError):
        for old in (stage / "old").iterdir():
            target = stage.parent / old.name
            if (stage / "new" / old.name).exists() and not os.path.lexists(target):
                try:
                    os.rename(old, target)
                except OSError:
                    if not os.path.lexists(target):  # else somebody else was faster
                        raise


# --- files --------------------------------------------------------------------------------------


def _write_into(path: Path, source: Path) -> None:
    number = _descriptor(path)
    with open(source, "rb") as content:
        with open(path if number is None else os.dup(number), "wb") as file:
            shutil.copyfileobj(content, file)


def _descriptor(path: Path) -> int | None:
    """Give the descriptor that a path such as /dev/stdout or /dev/fd/3 stands for.

    It may be a file that the shell opened and others write to: it is not replaced.
    """
    while path.is_symlink():
        folder = path.parent.resolve()
        if folder == Path(f"/proc/{os.getpid()}/fd"):
            return int(path.name)
        path = folder / path.readlink()
    return None


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter wraps a full disk
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> IntrafuseError:
    return IntrafuseError(
        f"the output cannot be written: {getattr(error, 'strerror', None) or error}",
        value=str(path),
        remedy="free space or choose another folder; nothing was written under that name",
    )
