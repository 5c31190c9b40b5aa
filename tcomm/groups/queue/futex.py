"""Sleeping until another process changes a word of shared memory: what Python lacks for it."""

from __future__ import annotations

import ctypes

__all__ = ["can_be_ordered", "order_others", "sleep_while", "wake_sleepers"]

# Only x86-64 orders plain stores, so rings are on x86-64 and these are its numbers.
_SYS_FUTEX, _SYS_MEMBARRIER = 202, 324
_WAIT, _WAKE = 0, 1
_ORDER, _REGISTER = 2, 4
_ALL = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_syscall = ctypes.CDLL(None).syscall
_syscall.restype = ctypes.c_long


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
    _syscall(
        ctypes.c_long(_SYS_FUTEX), ctypes.c_void_p(address), ctypes.c_long(_WAIT),
        ctypes.c_long(value & 0xFFFFFFFF), ctypes.byref(limit), None, ctypes.c_long(0),
    )  # fmt: skip


def wake_sleepers(address: int) -> None:
    """Wake everybody who sleeps on the word at `address`."""
    _syscall(
        ctypes.c_long(_SYS_FUTEX), ctypes.c_void_p(address), ctypes.c_long(_WAKE), ctypes.c_long(_ALL),
        None, None, ctypes.c_long(0),
    )  # fmt: skip


def can_be_ordered() -> bool:
    """Let `order_others` of other processes reach this one; False where the kernel has no such thing."""
    return bool(_membarrier(_REGISTER) == 0)


def order_others() -> None:
    """Make every process that `can_be_ordered` pass a full barrier, between two of its instructions."""
    _membarrier(_ORDER)


def _membarrier(command: int) -> int:
    number, none = ctypes.c_long(_SYS_MEMBARRIER), ctypes.c_uint(0)
    return int(_syscall(number, ctypes.c_int(command), none, ctypes.c_int(0)))
