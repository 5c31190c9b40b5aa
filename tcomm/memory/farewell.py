"""Telling the peers why this process leaves, however it leaves, short of being killed."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import sys
import threading
import weakref
from types import TracebackType

from tcomm.memory.control import ControlPage, Word

__all__ = ["announce_leaving", "cancel_leaving"]

_pages: weakref.WeakSet[ControlPage] = weakref.WeakSet()
_lock = threading.Lock()
_installed = False


def _after_fork() -> None:
    """Multiprocessing forgets the finalizers of the parent, and a thread of it may have held the lock."""
    global _installed, _lock
    _installed, _lock = False, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def announce_leaving(page: ControlPage) -> None:
    """Have `page` say why when this process ends by an exception, an exit or its last line."""
    global _installed  # noqa: PLW0603 - one hook per process
    with _lock:
        _pages.add(page)
        if _installed:
            return
        _installed = True
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _leave(_reason(error))
        previous(kind, error, trace)

    sys.excepthook = hook
    atexit.register(_leave, "its process exited")
    # A child of multiprocessing runs neither of the two; while its finalizers run, the exception that
    # ended it is the one being handled.
    multiprocessing.util.Finalize(None, _leave_child, exitpriority=100)


def cancel_leaving(page: ControlPage) -> None:
    """Forget `page`; its group was closed properly."""
    _pages.discard(page)


def _leave_child() -> None:
    error = sys.exc_info()[1]
    _leave(_reason(error) if error is not None else "its process exited")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _leave(reason: str) -> None:
    for page in list(_pages):
        # A forked child inherits the pages of its parent, who has not left.
        if page.words[Word.PID] == os.getpid():
            page.leave(reason)
