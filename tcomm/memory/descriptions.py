"""What a rank calls, put down in its control page for peers that call something else."""

from __future__ import annotations

from tcomm.memory.control import DESCRIPTION_SLOTS, ControlPage, Word
from tcomm.signature import CallDescription

__all__ = ["OwnDescriptions"]

_DESCRIBED = int(Word.DESCRIBED)


class OwnDescriptions:
    """The descriptions in this rank's page. The last few stay, and a call like one of them only points there.

    Kinds of calls in turn are the rule (a barrier between collectives, two layers of a model), and a
    description takes five times as long as a pointer to it.

    Args:
        page: of this rank.
    """

    def __init__(self, page: ControlPage) -> None:
        self._page = page
        self._words = page.words
        # The calls themselves are kept, so that their identities stay theirs.
        self._calls: list[CallDescription | None] = [None] * DESCRIPTION_SLOTS
        self._slots: dict[int, int] = {}
        self._pointed: list[CallDescription | None] = [None, None]

    def point(self, parity: int, call: CallDescription) -> None:
        """Say that the next call, of that parity, is like this; before its arrival word is published."""
        if self._pointed[parity] is call:
            return
        slot = self._slots.get(id(call))
        if slot is None:
            slot = self._put(call)
        self._pointed[parity] = None
        self._words[_DESCRIBED + parity] = slot
        self._pointed[parity] = call

    def _put(self, call: CallDescription) -> int:
        """Put it down where nobody reads: peers may still ask for what was called at the other parity."""
        words = self._words
        slot: int = min({*range(DESCRIPTION_SLOTS)} - {words[_DESCRIBED], words[_DESCRIBED + 1]})
        # A signal may come between any two: a description is known only while it is there as a whole.
        self._slots.pop(id(self._calls[slot]), None)
        self._page.describe(slot, call.encode())
        self._calls[slot] = call
        self._slots[id(call)] = slot
        return slot
