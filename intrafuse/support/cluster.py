"""Connect to a Ray cluster: a running one, or a new one on this machine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from intrafuse.support.errors import IntrafuseError
from intrafuse.support.extras import import_extra

__all__ = ["connected"]


@contextmanager
def connected(address: str | None, parallel: int | None = None) -> Generator[Any]:
    """Connect to Ray, and disconnect at the end from what was connected here.

    Args:
        address: address of a cluster. None uses the running Ray, or starts it on this machine.
        parallel: number of tasks at once on a cluster that is started here; None for all cores.

    Yields:
        The module `ray`.

    Raises:
        IntrafuseError: Ray is not installed, or cannot be reached or started.
    """
    ray: Any = import_extra("ray", "ray")
    own = not ray.is_initialized()
    if own:
        size = {} if address else {"num_cpus": parallel, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **size)
        except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
            raise IntrafuseError(
                f"Ray cannot be reached or started ({' '.join(str(error).split())})",
                value=address,
                remedy="start the cluster (ray start --head) and pass its address",
            ) from error
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
