"""Errors that a signal's handler raised in the middle of our work, told from our own."""

from __future__ import annotations

import functools
import signal
import traceback
from types import CodeType

__all__ = ["is_from_handler"]


def is_from_handler(error: BaseException) -> bool:
    """Whether a handler of a signal raised `error`, or passed it on, beneath the frame that has caught it.

    Such an error says nothing of what was being done when the signal came.
    """
    codes = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _code_of(handler: object) -> CodeType | None:
    """What runs when a signal comes; None where that is not Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not callable(handler):  # SIG_DFL, SIG_IGN, or one that C installed
        return None
    code = getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
