"""Sleeping until another process changes a word of shared memory: futex, which Python does not offer."""

from __future__ import annotations

import ctypes

__all__ = ["sleep_while", "wake_sleepers"]

# Only x86-64 orders plain stores, so rings are on x86-64 and this is its number.
_SYS_FUTEX = 202
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_futex = ctypes.CDLL(None).syscall
_futex.restype = ctypes.c_long


def sleep_while(address: int, value: int, seconds: float) -> None:
    """Sleep while the low 32 bits of a word are those of `value`, for some time at most.

    Returns at once when they are not, and early for a signal or for no reason: the caller looks again.

    Args:
        address: of the word, aligned to 8 bytes, in memory that stays mapped.
        value: that the caller has just seen there.
        seconds: positive.
    """
    whole, part = divmod(seconds, 1.0)
    limit = _Timespec(int(whole), int(part * 1e9))
    _futex(
        ctypes.c_long(_SYS_FUTEX), ctypes.c_void_p(address), ctypes.c_long(_WAIT),
        ctypes.c_long(value & 0xFFFFFFFF), ctypes.byref(limit), None, ctypes.c_long(0),
    )  # fmt: skip


def wake_sleepers(address: int) -> None:
    """Wake everybody who sleeps on the word at `address`."""
    _futex(
        ctypes.c_long(_SYS_FUTEX), ctypes.c_void_p(address), ctypes.c_long(_WAKE), ctypes.c_long(_ALL),
        None, None, ctypes.c_long(0),
    )  # fmt: skip
