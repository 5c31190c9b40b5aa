"""How a message is laid out, and which values are plain. `docs/objects.md` is the contract."""

from __future__ import annotations

import enum
import struct
from typing import Any

__all__ = [
    "ALIGNMENT",
    "HEAD",
    "INLINE_BYTES",
    "MARK",
    "SCALARS",
    "VERSION",
    "Form",
    "Tag",
    "align",
    "is_plain",
]

MARK = 0xC1
"""First byte of a message with more than plain values; msgpack never begins with it."""
VERSION = 1
HEAD = struct.Struct("<BBHI")
"""Mark, version, form, bytes of the structure that follows."""
ALIGNMENT = 64
"""Every buffer begins at a multiple of this, counted from the beginning of the message."""
INLINE_BYTES = 1 << 16
"""Bytes objects up to this many stand in the structure; larger ones are buffers, which are not copied."""
SCALARS = frozenset({type(None), bool, int, float, str})


class Form(enum.IntEnum):
    """How a structure tells what its values are."""

    TAGGED = 0
    """All but scalars are lists that begin with a tag."""
    MARKED = 1
    """They are what they are, but for an extension of msgpack in the place of each buffer."""


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


def is_plain(value: Any, depth: int, longest: int = INLINE_BYTES) -> bool:
    """Whether msgpack alone gives back `value`, types and all, and it is at most `depth` containers deep.

    Args:
        value: of any type.
        depth: containers that may lie in one another.
        longest: bytes that a `bytes` object may have.
    """
    # Half of what a short message costs, on either side: most values are told by one or two comparisons.
    kind = type(value)
    if kind is dict and depth:
        for key, item in value.items():
            if type(key) is not str and type(key) not in SCALARS:
                return False
            kind = type(item)
            if kind is str or kind is int or kind in SCALARS:
                continue
            if len(item) > longest if kind is bytes else not is_plain(item, depth - 1, longest):
                return False
        return True
    if kind is list and depth:
        for item in value:
            kind = type(item)
            if kind is int or kind is str or kind in SCALARS:
                continue
            if len(item) > longest if kind is bytes else not is_plain(item, depth - 1, longest):
                return False
        return True
    return kind in SCALARS or (kind is bytes and len(value) <= longest)
