"""How a message is laid out, and which values are plain. `docs/objects.md` is the contract."""

from __future__ import annotations

import enum
import struct
from typing import Any

__all__ = ["ALIGNMENT", "HEAD", "INLINE_BYTES", "MARK", "SCALARS", "VERSION", "Tag", "align", "is_plain"]

MARK = 0xC1
"""First byte of a message with more than plain values; msgpack never begins with it."""
VERSION = 1
HEAD = struct.Struct("<BBHI")
"""Mark, version, zero, bytes of the structure that follows."""
ALIGNMENT = 64
"""Every buffer begins at a multiple of this, counted from the beginning of the message."""
INLINE_BYTES = 4096
"""Bytes objects up to this many stand in the structure; larger ones are buffers, which are not copied."""
SCALARS = frozenset({type(None), bool, int, float, str})


class Tag(enum.IntEnum):
    """First item of every list in a structure: what the list stands for."""

    PLAIN = 0
    LIST = 1
    TUPLE = 2
    DICT = 3
    SET = 4
    FROZENSET = 5
    INT = 6
    STR = 7
    BYTES = 8
    BYTEARRAY = 9
    ARRAY = 10
    NUMBER = 11
    TENSOR = 12
    DTYPE = 13
    DEVICE = 14
    SIZE = 15
    REGISTERED = 16


def align(offset: int) -> int:
    """The first place for a buffer at or after `offset`, in bytes."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def is_plain(value: Any, depth: int) -> bool:
    """Whether msgpack alone gives back `value`, types and all, and it is at most `depth` containers deep."""
    kind = type(value)
    if kind in SCALARS:
        return True
    if kind is dict:
        if not depth or not _are_scalars(map(type, value)):
            return False
        items = value.values()
    elif kind is list:
        if not depth:
            return False
        if _are_scalars(map(type, value)):
            return True
        items = value
    else:
        return kind is bytes and len(value) <= INLINE_BYTES
    for item in items:  # noqa: SIM110 - all() of a generator takes twice as long
        if type(item) not in SCALARS and not is_plain(item, depth - 1):
            return False
    return True


_are_scalars = SCALARS.issuperset
