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
        self._slots: list[CallDescription | None] = [None] * DESCRIPTION_SLOTS
        self._pointed: list[CallDescription | None] = [None, None]

    def point(self, parity: int, call: CallDescription) -> None:
        """Say that calls of `parity` are like this; before the arrival word is published."""
        if self._pointed[parity] is call:
            return
        for slot, known in enumerate(self._slots):
            if known is call:
                break
        else:
            slot = self._put(call)
        # In this order, for a signal may come between any two.
        self._pointed[parity] = None
        self._words[_DESCRIBED + parity] = slot
        self._pointed[parity] = call

    def _put(self, call: CallDescription) -> int:
        """Put it down where nobody reads: of the other parity, peers may still ask for what was called."""
        words = self._words
        slot = min({*range(DESCRIPTION_SLOTS)} - {words[_DESCRIBED], words[_DESCRIBED + 1]})
        self._slots[slot] = None
        self._page.describe(slot, call.encode())
        self._slots[slot] = call
        return slot
