"""Import modules that an extra of the package installs."""

from __future__ import annotations

import importlib
from types import ModuleType

from intrafuse.support.errors import IntrafuseError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that an extra of the package installs.

    Args:
        module: full name of the module, such as "pyarrow.parquet".
        extra: the extra that installs the module, such as "data".

    Raises:
        IntrafuseError: the module cannot be imported; the message names the extra.

    >>> import_extra("json", "data").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: a broken installation
        raise IntrafuseError(
            f"{module} cannot be imported ({error})",
            remedy=f'pip install "intrafuse[{extra}]"',
        ) from error
