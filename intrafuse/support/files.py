"""Write files and folders atomically: the final name never refers to a partial file.

Each writer first writes into a stage, a hidden folder beside the target:

    .intrafuse-RANDOM.tmp/lock       locked while the writer lives; the kernel unlocks it at exit
    .intrafuse-RANDOM.tmp/new/NAME   the new file or folder
    .intrafuse-RANDOM.tmp/old/NAME   the replaced folder, between two renames

One rename replaces a file. On Linux, one exchange of two names replaces a folder. Elsewhere (macOS,
network file systems) a folder takes two renames. A writer that dies between them leaves NAME in
both `old` and `new`; the next writer in the same parent folder, or the next reader of NAME, moves
the old folder back. Symbolic links to versions would need no exchange, but a saved network stays a
plain folder that users can copy and rename. If the lock of a stage is free, its writer is dead, and
the next writer removes the stage. Process ids would not show this: they are reused, also across
containers. On file systems without locks, the stages of dead writers remain.
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

__all__ = [
    "file_target",
    "folder_target",
    "locked",
    "put_back",
    "remove_folder",
    "replacing",
    "replacing_folder",
    "sweep",
]

PREFIX, SUFFIX = ".intrafuse-", ".tmp"
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path` once it is complete.

    Symbolic links are followed and kept. Pipes and devices such as /dev/null are written into.

    Raises:
        IntrafuseError: the file cannot be written (no folder, no space, no permission), or `path`
            names something that can be neither replaced nor written into.
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

    The new folder replaces an existing folder as a whole. Symbolic links are followed and kept.

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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and let only one process at a time work in it.

    Raises:
        IntrafuseError: another process works there, or the folder cannot be made.
    """
    with _telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError) as error:
            raise IntrafuseError(
                "another run works in this folder",
                value=str(folder.parent),
                remedy="wait for it, or choose a new folder",
            ) from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder with everything in it; to readers it is there as a whole or not at all.

    Raises:
        IntrafuseError: the folder cannot be removed.
    """
    with _telling(path), _staging(path) as stage:
        os.rename(path, stage.new)


def file_target(path: Path) -> Path | None:
    """Return the file that `replacing` replaces, or None if it writes into a pipe or a device.

    Raises:
        IntrafuseError: `path` names something other than a file, or is not a valid name.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # a loop of links, too long a name, a NUL
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
    """Return the folder that `replacing_folder` makes or replaces; restore it with `put_back`.

    Raises:
        IntrafuseError: `path` names a file, or is not a valid name.
    """
    try:
        folder = Path(path).expanduser().resolve()
        put_back(folder)
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        return folder
    except (OSError, RuntimeError, ValueError) as error:  # link loop, unknown user, long name
        raise _cannot_write(Path(path), error) from error
    if not stat.S_ISDIR(mode):
        raise IntrafuseError(
            "the output must be a folder, but it is a file",
            value=str(path),
            remedy="choose another name",
        )
    return folder


def put_back(path: Path) -> None:
    """Move a folder back to its name after its writer died between two renames.

    No lock is needed: a live writer sees the restored folder and replaces it again.
    """
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path):
        for stage in _stages(path.parent):
            with suppress(OSError):
                _return_old(stage)


def sweep(folder: Path) -> None:
    """Move back the folders that dead writers in `folder` had moved away; remove their stages."""
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
    """The hidden folder in which one writer works."""

    folder: Path
    name: str

    @property
    def new(self) -> Path:
        return self.folder / "new" / self.name

    @property
    def old(self) -> Path:
        return self.folder / "old" / self.name

    def flush(self, file: Path) -> None:
        """Flush a file to disk, with the permissions that the user's umask allows.

        Some libraries write private files. Reading the umask of a process means changing it,
        which other threads would see. The lock file was created under the umask and shows it.
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
                f"the replaced folder cannot be moved back: {error.strerror}",
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
    """Lock a stage while a descriptor is open; return None if the file system has no locks.

    Raises:
        BlockingIOError: the writer of the stage lives, or another sweep removes the stage.
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
    """Rename the new folder to its final name, also while other writers do the same."""
    while True:
        try:
            return os.rename(stage.new, target)  # the name is free, or an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _exchange(stage.new, target):
            return
        if stage.old.exists():  # another writer has replaced this one
            os.rename(stage.old, tempfile.mkdtemp(dir=stage.folder))
        stage.old.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another writer has just moved the target away
            os.rename(target, stage.old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return False if the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def _return_old(stage: Path) -> None:
    """Move back the replaced folder of a stage if its name is free."""
    with suppress(FileNotFoundError):
        for old in (stage / "old").iterdir():
            target = stage.parent / old.name
            if (stage / "new" / old.name).exists() and not os.path.lexists(target):
                try:
                    os.rename(old, target)
                except OSError:
                    if not os.path.lexists(target):  # else another process was faster
                        raise


# --- files --------------------------------------------------------------------------------------


def _write_into(path: Path, source: Path) -> None:
    number = _descriptor(path)
    with open(source, "rb") as content:
        with open(path if number is None else os.dup(number), "wb") as file:
            shutil.copyfileobj(content, file)


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor that a path such as /dev/stdout or /dev/fd/3 names.

    Such a file may be open in the shell and in other programs, so it is not replaced.
    """
    while path.is_symlink():
        folder = path.parent.resolve()
        if folder == Path(f"/proc/{os.getpid()}/fd"):
            return int(path.name)
        path = folder / path.readlink()
    return None


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush folders
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # SafetensorError wraps a full disk
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> IntrafuseError:
    return IntrafuseError(
        f"the output cannot be written: {getattr(error, 'strerror', None) or error}",
        value=str(path),
        remedy="free space or choose another folder; nothing was written under that name",
    )
