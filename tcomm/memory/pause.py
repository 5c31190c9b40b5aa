"""Pauses between two looks at a store."""

from __future__ import annotations

import time

__all__ = ["Pause"]

_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.0002, 0.02
_SHARE = 4
"""Of what was waited, the part that a pause is."""


class Pause:
    """Sleeps a part of what was waited so far: a store has to be asked, and should not be kept busy.

    So a wait lasts at most a quarter longer than it has to, and costs few looks.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> None:
        """Sleep."""
        waited = time.monotonic() - self._began
        time.sleep(min(max(waited / _SHARE, _SHORTEST_SECONDS), _LONGEST_SECONDS))
