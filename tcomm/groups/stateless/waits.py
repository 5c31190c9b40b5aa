"""Pauses between two looks at a store."""

from __future__ import annotations

import time

__all__ = ["Pause"]

_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.0003, 0.02


class Pause:
    """Sleeps a little longer at each call: a store has to be asked, and should not be kept busy."""

    def __init__(self) -> None:
        self._seconds = _SHORTEST_SECONDS

    def __call__(self) -> None:
        """Sleep."""
        time.sleep(self._seconds)
        self._seconds = min(1.5 * self._seconds, _LONGEST_SECONDS)
