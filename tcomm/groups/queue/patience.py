"""How long one call may wait, and how it waits: polling a little, yielding a little, then asleep."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from tcomm.config import Config, resolve_timeout
from tcomm.errors import CommError

__all__ = ["LOOK_SECONDS", "SPINS_BETWEEN_YIELDS", "Patience", "default_seconds", "spin_until", "spins_among"]

LOOK_SECONDS = 0.1
"""Between two looks at the dead, the deadline and signals."""
SPINS_BETWEEN_YIELDS = 250
_BUSY_SECONDS = 0.001
_CANCEL_SECONDS = 0.02
_YIELDS_BETWEEN_CLOCKS = 8
_SPINS_WITH_A_CORE_EACH, _SPINS_OTHERWISE = 3000, 1


class Patience:
    """The patience of one call, from now on.

    Args:
        timeout: seconds or a profile; None: `default`.
        default: seconds; None: as long as the other side lives.
        cancel: ends the wait when it is set.
        indefinite: wait as long as the other side lives.

    Attributes:
        seconds: that it may take; None: as long as the other side lives.
        deadline: on the monotonic clock, likewise.

    Raises:
        ConfigError: when the timeout makes no sense.
    """

    def __init__(
        self,
        timeout: float | str | None,
        default: float | None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> None:
        self._cancel = cancel
        seconds = default if timeout is None else resolve_timeout(timeout)
        self.seconds = None if indefinite else seconds
        self.deadline = None if self.seconds is None else time.monotonic() + self.seconds

    def refuse_cancelled(self) -> None:
        """Raise CommError "cancelled" when the caller's event is set."""
        if self._cancel is not None and self._cancel.is_set():
            raise CommError("cancelled")

    def slice(self) -> float:
        """Seconds to sleep before the next look; 0 or less when the deadline has passed."""
        longest = LOOK_SECONDS if self._cancel is None else _CANCEL_SECONDS
        return longest if self.deadline is None else min(longest, self.deadline - time.monotonic())


def default_seconds() -> float | None:
    """Seconds of the profile of TCOMM_TIMEOUT; None: without end."""
    return resolve_timeout(Config.from_environment().timeout)


def spins_among(processes: int) -> int:
    """How often to look at a word before anything else, where so many processes wait for one another."""
    return _SPINS_WITH_A_CORE_EACH if processes <= len(os.sched_getaffinity(0)) else _SPINS_OTHERWISE


def spin_until(is_done: Callable[[], bool], spins: int) -> bool:
    """Poll `spins` times, then a millisecond with yields; whether `is_done` said so."""
    for _ in range(spins):
        if is_done():
            return True
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        for _ in range(_YIELDS_BETWEEN_CLOCKS):
            if is_done():
                return True
            os.sched_yield()
        if time.monotonic() >= end:
            return False
