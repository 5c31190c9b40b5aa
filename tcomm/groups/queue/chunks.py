"""Messages as chunks and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tcomm.errors import DecodeError
from tcomm.objects.codec import MAX_NBYTES

__all__ = ["Assembler", "cut"]


def cut(parts: Sequence[bytes | memoryview], nbytes: int) -> Iterator[list[memoryview]]:
    """The concatenation of `parts` in chunks of `nbytes`, the last one shorter; nothing is copied."""
    chunk: list[memoryview] = []
    room = nbytes
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            chunk.append(piece)
            room -= len(piece)
            if not room:
                yield chunk
                chunk, room = [], nbytes
    if chunk:
        yield chunk


class Assembler:
    """A message of several chunks, as far as it has come.

    Attributes:
        is_open: whether something has come.
    """

    def __init__(self) -> None:
        self._message = memoryview(b"")
        self._filled = 0
        self.is_open = False

    def drop(self) -> None:
        """Forget what has come: its writer gave up, or it was damaged."""
        self._message, self._filled, self.is_open = memoryview(b""), 0, False

    def add(self, total: int, offset: int, chunk: memoryview) -> memoryview | None:
        """Put a chunk in its place; the whole message when it was the last one, until `drop`.

        A chunk that comes twice in a row is put there once: its reader was interrupted.

        A chunk in the middle of a message of which the beginning was damaged belongs to nothing, and is
        passed over.

        Raises:
            DecodeError: when it is not the next chunk of the message.
        """
        if offset == 0:
            self._begin(total, len(chunk))
        elif not self.is_open:
            return None
        end = offset + len(chunk)
        if end == self._filled and total == len(self._message):
            return self._message if end == total else None
        if offset != self._filled or total != len(self._message) or not self._filled < end <= total:
            filled, expected = self._filled, len(self._message)
            self.drop()
            raise DecodeError(
                f"a chunk of bytes {offset} to {end} of {total} follows {filled} of {expected} bytes"
            )
        self._message[offset:end] = chunk
        self._filled = end
        return self._message if end == total else None

    def _begin(self, total: int, nbytes: int) -> None:
        self.drop()
        if not 0 < nbytes <= total <= MAX_NBYTES:
            raise DecodeError(f"a chunk of {nbytes} bytes begins a message of {total}")
        try:
            # Unlike bytearray's, these pages take no memory before something is written to them.
            self._message = np.empty(total, np.uint8).data
        except MemoryError:
            raise DecodeError(f"there is no memory for a message of {total} bytes") from None
        self.is_open = True
