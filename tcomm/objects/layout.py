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
INLINE_BYTES = 1 << 16
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
    if kind in SCALARS or (kind is bytes and len(value) <= INLINE_BYTES):
        return True
    if not depth:
        return False
    if kind is dict:
        for key in value:
            if type(key) not in SCALARS:
                return False
        items = value.values()
    elif kind is list:
        if len(value) > _MANY and _are_scalars(map(type, value)):
            return True
        items = value
    else:
        return False
    for item in items:
        kind = type(item)
        if not (
            kind in SCALARS or (kind is bytes and len(item) <= INLINE_BYTES) or is_plain(item, depth - 1)
        ):
            return False
    return True


_are_scalars = SCALARS.issuperset
_MANY = 16
"""From so many items on, one call for all takes less than a loop."""
