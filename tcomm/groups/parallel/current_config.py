"""The `ParallelConfig` in force, and what it says about deadlines."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
from collections.abc import Iterator

from tcomm.groups.parallel.parallel_config import ParallelConfig

__all__ = [
    "current_parallel_config",
    "get_cpu_distributed_timeout_or_none",
    "get_distributed_timeout_or_none",
    "use_parallel_config",
]

_current: contextvars.ContextVar[ParallelConfig | None] = contextvars.ContextVar(
    "tcomm_parallel_config", default=None
)


def current_parallel_config() -> ParallelConfig | None:
    """The config of the innermost `use_parallel_config`; None outside, and in a thread that entered none."""
    return _current.get()


@contextlib.contextmanager
def use_parallel_config(config: ParallelConfig | None) -> Iterator[ParallelConfig | None]:
    """Put a config in force in this thread or task; None: none. The one before is back in the end."""
    token = _current.set(config)
    try:
        yield config
    finally:
        _current.reset(token)


def get_distributed_timeout_or_none() -> datetime.timedelta | None:
    """How long groups of devices wait, by the config in force; None: as the backend does."""
    config = current_parallel_config()
    return _span(config.distributed_timeout_seconds if config else None)


def get_cpu_distributed_timeout_or_none() -> datetime.timedelta | None:
    """How long groups of CPUs wait, by the config in force; None: as the backend does."""
    config = current_parallel_config()
    return _span(config.cpu_distributed_timeout_seconds if config else None)


def _span(seconds: int | None) -> datetime.timedelta | None:
    return None if seconds is None else datetime.timedelta(seconds=seconds)
