"""Getting ranks that wait for one another off a core that they share."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

__all__ = ["HomeCore"]

_current_core: Callable[[], int] = getattr(ctypes.PyDLL(None), "sched_getcpu", lambda: -1)
_VISITS_PER_LOOK = 16


class HomeCore:
    """The core of a rank among those that it may run on: ranks spread over as many as they can.

    Args:
        rank: this process, within the group.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._core = -1
        self._visits = 0

    def go(self) -> None:
        """Move this thread there. It may run on all its cores again at once, and stays if it has reason to.

        Where it is there already, this takes a tenth of the time, but for every sixteenth time: by now it may
        run on other cores.
        """
        self._visits += 1
        if _current_core() == self._core and self._visits % _VISITS_PER_LOOK:
            return
        cores = os.sched_getaffinity(0)
        self._core = sorted(cores)[self._rank % len(cores)]
        os.sched_setaffinity(0, {self._core})
        os.sched_setaffinity(0, cores)
