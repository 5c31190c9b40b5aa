"""Giving the processor to somebody else."""

from __future__ import annotations

import os
import sys
import time

__all__ = ["USE_SCHED_YIELD", "sched_yield"]

USE_SCHED_YIELD: bool = sys.version_info >= (3, 11, 1)
"""Whether `os.sched_yield` lets go of the GIL; before Python 3.11.1 it does not."""


def sched_yield() -> None:
    """Let another thread or process run, if one wants to."""
    if USE_SCHED_YIELD:
        os.sched_yield()
    else:
        time.sleep(0)
