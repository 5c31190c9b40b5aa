"""Errors that a signal's handler raised in the middle of our work, told from our own."""

from __future__ import annotations

import itertools
import traceback
from types import FrameType

__all__ = ["is_from_handler"]


def is_from_handler(error: BaseException) -> bool:
    """Whether a handler of a signal raised `error`, or passed it on, beneath the frame that has caught it.

    Such an error says nothing of what was being done when the signal came. Who is installed as a handler by
    now does not matter: a handler is known by the frame that it interrupted, which it is given.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(itertools.starmap(_has_interrupted, itertools.pairwise(frames)))


def _has_interrupted(caller: FrameType, frame: FrameType) -> bool:
    """Whether `frame` was given its caller's frame, as `(number, frame)` or `(*args)`."""
    for value in frame.f_locals.values():
        if value is caller or (type(value) is tuple and any(item is caller for item in value)):
            return True
    return False
