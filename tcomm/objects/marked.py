"""Plain values that hold large `bytes`: msgpack walks them, and a mark stands where a buffer belongs."""

from __future__ import annotations

from typing import Any

import msgspec

from tcomm.errors import DecodeError
from tcomm.objects.layout import HEAD, INLINE_BYTES, Tag, align, is_plain
from tcomm.objects.packing import encode_plain
from tcomm.objects.payload import Arrived, Payload
from tcomm.objects.unpacking import decode_plain

__all__ = ["decode_marked", "encode_marked", "is_marked"]

_BYTES = int(Tag.BYTES)


def encode_marked(value: Any, max_depth: int) -> tuple[bytes, list[memoryview]] | None:
    """The structure and buffers of a dict or list with large `bytes` in it, plain but for these; else None.

    Args:
        value: of any type. It is not changed.
        max_depth: containers that may lie in one another.
    """
    kind = type(value)
    if kind is not dict and kind is not list:
        return None
    items = value.items() if kind is dict else enumerate(value)
    large = [(key, item) for key, item in items if type(item) is bytes and len(item) > INLINE_BYTES]
    if not large:
        return None
    marked = value.copy()
    for key, _ in large:
        marked[key] = None
    try:
        if not is_plain(marked, max_depth):
            return None
        for key, item in large:
            marked[key] = msgspec.msgpack.Ext(_BYTES, encode_plain(len(item)))
        return encode_plain(marked), [memoryview(item) for _, item in large]
    except (ValueError, OverflowError, RecursionError):
        # Who encodes it with tags finds a way, or says what is wrong and where.
        return None


class _Buffers:
    """The buffers of a message, one after another."""

    __slots__ = ("_arrived", "_data", "_end")

    def __init__(self, data: memoryview, end: int, arrived: Arrived | None) -> None:
        self._data = data
        self._end = end
        self._arrived = arrived

    def make(self, tag: int, described: memoryview) -> bytes:
        """What belongs where a mark stands: the next buffer."""
        if tag != _BYTES:
            raise DecodeError(f"extension {tag} of msgpack may not travel")
        nbytes = decode_plain(described)
        if type(nbytes) is not int or nbytes < 0:
            raise DecodeError("a buffer of the message has no possible size")
        begin = align(self._end)
        self._end = begin + nbytes
        if self._end > len(self._data):
            self.refuse_rest()
        return Payload(self._data, begin, self._end, self._arrived).to_bytes()

    def refuse_rest(self) -> None:
        """Raise DecodeError when the message does not end where its buffers do."""
        if self._end != len(self._data):
            raise DecodeError(f"the message says that it has {self._end} bytes, and has {len(self._data)}")


def decode_marked(data: memoryview, end: int, arrived: Arrived | None) -> object:
    """The value of a message whose structure has marks; `is_marked` tells whether it is one that may travel.

    Args:
        data: the whole message.
        end: of the structure.
        arrived: for a message that is still coming; None: it is all there.

    Raises:
        DecodeError: when a mark means nothing, or its buffers are not what follows. Others mean the same.
    """
    buffers = _Buffers(data, end, arrived)
    value: object = msgspec.msgpack.decode(data[HEAD.size : end], ext_hook=buffers.make)
    buffers.refuse_rest()
    return value


def is_marked(value: Any, max_depth: int) -> bool:
    """Whether `encode_marked` could have made a structure of `value`."""
    kind = type(value)
    if kind is dict:
        return is_plain({key: _but_for_bytes(item) for key, item in value.items()}, max_depth)
    return kind is list and is_plain([_but_for_bytes(item) for item in value], max_depth)


def _but_for_bytes(item: object) -> object:
    return None if type(item) is bytes else item
