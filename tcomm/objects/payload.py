"""Bytes of a message that may still be on their way while its beginning is read already."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

__all__ = ["Arrived", "Payload"]

Arrived = Callable[[int], int]
"""Waits until so many bytes of a message have come; says how many have, or raises."""
_BLOCK_BYTES = 1
"""Of a `BufferedReader`; what is left over of a larger one would pass through its buffer."""


class Payload:
    """One buffer of a message.

    Args:
        data: the whole message, unsigned bytes.
        begin: where the buffer begins in it.
        end: where it ends.
        arrived: None when all of `data` has come.
    """

    __slots__ = ("_arrived", "_begin", "_data", "_end")

    def __init__(self, data: memoryview, begin: int, end: int, arrived: Arrived | None = None) -> None:
        self._data = data
        self._begin = begin
        self._end = end
        self._arrived = arrived

    def __len__(self) -> int:
        return self._end - self._begin

    def view(self) -> memoryview:
        """The buffer itself, once it has come."""
        if self._arrived is not None:
            self._arrived(self._end)
        return self._data[self._begin : self._end]

    def copy_into(self, target: memoryview) -> None:
        """Copy the buffer as it comes.

        Args:
            target: unsigned bytes, as many.
        """
        if self._arrived is None:
            target[:] = self._data[self._begin : self._end]
            return
        filled = 0
        while filled < len(target):
            filled += self._copy_some(self._begin + filled, target[filled:])

    def to_bytes(self) -> bytes:
        """A copy of the buffer, made as it comes."""
        if self._arrived is None:
            return bytes(self._data[self._begin : self._end])
        # Of what the library offers, only this fills a bytes object part by part, without another copy.
        try:
            reader = _idle_readers.pop()
        except IndexError:
            reader = _BytesReader(_Stream(), _BLOCK_BYTES)
        stream = reader.raw
        stream.payload, stream.at = self, self._begin
        made = reader.read(len(self))
        # Where that raised, it is not used again: it may hold a part.
        stream.payload = None
        _idle_readers.append(reader)
        return made

    def _copy_some(self, begin: int, target: memoryview) -> int:
        assert self._arrived is not None
        count = min(self._arrived(begin + 1), begin + len(target)) - begin
        target[:count] = self._data[begin : begin + count]
        return count


class _Stream(io.RawIOBase):
    """Payloads as one file without end; a payload is read from its beginning to its end."""

    payload: Payload | None = None
    at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        payload, at = self.payload, self.at
        if payload is None or at == payload._end:
            return 0
        count = payload._copy_some(at, target[: payload._end - at])
        self.at = at + count
        return count


class _BytesReader(io.BufferedReader):
    """Makes bytes of payloads, one after another: to make and to close one takes 10 us."""

    raw: _Stream


_idle_readers: list[_BytesReader] = []
"""Those that nobody reads with; a thread takes one out while it does."""
