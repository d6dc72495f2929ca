"""Write files and folders so that nothing half-written ever stands under the final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from intrafuse.errors import IntrafuseError

__all__ = ["replacing", "replacing_folder"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` and rename it to `path` once it is complete.

    Raises:
        IntrafuseError: the file cannot be written (no folder, no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter wraps a full disk
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` and rename it to `path` once it is complete.

    A folder that stood under the name is replaced by the new one as a whole.

    Raises:
        IntrafuseError: the folder cannot be written, or `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise IntrafuseError(
            "the output must be a folder, but a file has that name", value=str(path)
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        temporary.chmod(_mode(0o777))
        if path.exists():
            old = temporary.with_suffix(".old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter wraps a full disk
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mode(most: int) -> int:
    """Take from a mode what the user's umask forbids; temporary files start as private."""
    umask = os.umask(0o077)
    os.umask(umask)
    return most & ~umask


def _flush(path: Path) -> None:
    path.chmod(_mode(0o666))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: Exception) -> IntrafuseError:
    return IntrafuseError(
        f"the output cannot be written: {getattr(error, 'strerror', None) or error}",
        value=str(path),
        remedy="free space or choose another folder; nothing was written under that name",
    )
