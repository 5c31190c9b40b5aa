"""A thread that ends the waits of a GPU whose peer is gone.

A kernel sees arrival words and a clock, and no processes. So somebody on the host looks after the peers.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

__all__ = ["Watch"]

_SECONDS_BETWEEN_LOOKS = 0.25


class Watched(Protocol):
    """What looks."""

    def look(self) -> bool:
        """Look after the peers once; True when there is no reason to look again."""
        ...


class Watch:
    """A daemon thread that looks now and then until it is stopped, or nobody holds what it looks by.

    Args:
        watched: its `look` is called; kept by nobody here.
        name: of the thread.
    """

    def __init__(self, watched: Watched, name: str) -> None:
        self._watched = weakref.ref(watched)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_LOOKS):
            watched = self._watched()
            if watched is None or watched.look():
                return
            del watched

    def stop(self) -> None:
        """End the thread; returns when it looks no more. May be called twice."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
