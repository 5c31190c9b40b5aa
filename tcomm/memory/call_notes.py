"""What each rank launched last on its GPU, where the peers on its machine can read it.

A host is ahead of its GPU by many calls, so a page has a note of each of the last few. A note is found again
by the signature of its call: the number of a call on the device is another than the host's as soon as graphs
are replayed.
"""

from __future__ import annotations

import msgspec

from tcomm.memory.control import DEVICE_CALL_SLOTS, DEVICE_CALL_WORDS, DEVICE_CALLS, ControlPage
from tcomm.signature import CallDescription, decode_description

__all__ = ["CallNotes"]

_SEQ, _SIGNATURE, _LENGTH, _TEXT = 0, 1, 2, 3
_TEXT_BYTES = (DEVICE_CALL_WORDS - _TEXT) * 8


class CallNotes:
    """The notes in one rank's page.

    Args:
        page: on the host.
    """

    def __init__(self, page: ControlPage) -> None:
        self._page = page
        self._call: CallDescription | None = None
        self._text = b""
        self._signature = 0

    def put(self, seq: int, call: CallDescription) -> None:
        """Note a call before it is launched."""
        if call is not self._call:
            self._call, self._text, self._signature = call, _brief(call), call.signature
        words, first = self._page.words, DEVICE_CALLS + seq % DEVICE_CALL_SLOTS * DEVICE_CALL_WORDS
        words[first + _SEQ] = 0
        words[first + _LENGTH] = len(self._text)
        start = (first + _TEXT) * 8
        self._page.bytes[start : start + len(self._text)] = self._text
        words[first + _SIGNATURE] = self._signature
        words[first + _SEQ] = seq

    def find(self, signature: int) -> tuple[int, CallDescription | None] | None:
        """Number and description of the latest call of that signature, or None where it is forgotten."""
        found = [(seq, place) for seq, theirs, place in self._all() if theirs == signature]
        return (max(found)[0], self._description(max(found)[1])) if found else None

    def at(self, seq: int) -> tuple[int, CallDescription | None] | None:
        """Signature and description of the call of that number, or None where it is not there."""
        for number, signature, place in self._all():
            if number == seq:
                return signature, self._description(place)
        return None

    def _description(self, place: int) -> CallDescription | None:
        length = min(self._page.words[place + _LENGTH], _TEXT_BYTES)
        start = (place + _TEXT) * 8
        return decode_description(bytes(self._page.bytes[start : start + length]))

    def _all(self) -> list[tuple[int, int, int]]:
        """(number, signature, place) of every note."""
        words = self._page.words
        places = range(DEVICE_CALLS, DEVICE_CALLS + DEVICE_CALL_SLOTS * DEVICE_CALL_WORDS, DEVICE_CALL_WORDS)
        return [(words[p + _SEQ], words[p + _SIGNATURE], p) for p in places if words[p + _SEQ]]


def _brief(call: CallDescription) -> bytes:
    """A description that fits: without sizes where it would not."""
    data = call.encode()
    if len(data) <= _TEXT_BYTES:
        return data
    short = msgspec.structs.replace(call, sizes=(), send_splits=(), recv_splits=())
    return short.encode()[:_TEXT_BYTES]
