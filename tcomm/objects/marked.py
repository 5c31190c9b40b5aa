"""Plain values that hold large `bytes`: msgpack walks them, and a mark stands where a buffer belongs."""

from __future__ import annotations

from typing import Any

import msgspec

from tcomm.errors import DecodeError
from tcomm.objects.handlers import is_from_handler
from tcomm.objects.layout import HEAD, INLINE_BYTES, SCALARS, Tag, align, is_plain
from tcomm.objects.packing import encode_plain
from tcomm.objects.payload import Arrived, Payload
from tcomm.objects.unpacking import decode_plain

__all__ = ["decode_marked", "encode_marked", "mark"]

_BYTES = int(Tag.BYTES)
_CONTAINERS = (dict, list)


def encode_marked(value: Any, max_depth: int) -> tuple[bytes, list[memoryview]] | None:
    """The structure and buffers of a dict or list with large `bytes` in it, plain but for these; else None.

    Args:
        value: of any type. It is not changed.
        max_depth: containers that may lie in one another.
    """
    kind = type(value)
    if kind not in _CONTAINERS:
        return None
    # First, so that nobody changes it meanwhile.
    marked = value.copy()
    items = marked.items() if kind is dict else enumerate(marked)
    large = [(key, item) for key, item in items if type(item) is bytes and len(item) > INLINE_BYTES]
    if not large or (kind is dict and not SCALARS.issuperset(map(type, marked))):
        return None
    for key, _ in large:
        marked[key] = None
    try:
        if not is_plain(marked, max_depth):
            return None
        for key, item in large:
            marked[key] = mark(len(item))
        return encode_plain(marked), [memoryview(item) for _, item in large]
    except (ValueError, OverflowError, RecursionError) as error:
        if is_from_handler(error):
            raise
        # Who encodes it with tags finds a way, or says what is wrong and where.
        return None


def mark(nbytes: int) -> msgspec.msgpack.Ext:
    """What stands for a buffer of so many bytes."""
    return msgspec.msgpack.Ext(_BYTES, encode_plain(nbytes))


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


def decode_marked(data: memoryview, end: int, max_depth: int, arrived: Arrived | None) -> object:
    """The value of a message whose structure has marks.

    Args:
        data: the whole message.
        end: of the structure.
        max_depth: containers that may lie in one another.
        arrived: for a message that is still coming; None: it is all there.

    Raises:
        DecodeError: when a mark means nothing, its buffers are not what follows, or the rest is not plain.
            Other errors mean the same.
    """
    buffers = _Buffers(data, end, arrived)
    value: object = msgspec.msgpack.decode(data[HEAD.size : end], ext_hook=buffers.make)
    buffers.refuse_rest()
    if type(value) not in _CONTAINERS or not is_plain(value, max_depth, len(data)):
        raise DecodeError("the message is deeper than max_depth allows, or what should be plain is not")
    return value
