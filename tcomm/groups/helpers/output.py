"""Keeping libraries quiet."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tcomm.config import EngineConfig

__all__ = ["suppress_stdout"]


@contextlib.contextmanager
def suppress_stdout() -> Iterator[None]:
    """Send what is written to standard output, by C code too, to nowhere; standard error stays.

    Does nothing where standard output has no file descriptor, or `TCOMM_LOGGING_LEVEL=DEBUG`. The descriptor
    is the whole process's: other threads fall silent as well, and two of these must not overlap in threads.
    """
    stream = sys.stdout
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = None
    if descriptor is None or EngineConfig.from_environment().logging_level == "DEBUG":
        yield
        return
    stream.flush()
    kept = os.dup(descriptor)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            # Before the descriptor is back, or what was held would come out now.
            stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
