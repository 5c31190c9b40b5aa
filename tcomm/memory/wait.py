"""A wait that was not short: it looks at the dead, the poison word and the clock, and yields in between."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tcomm.memory.control import MAX_PHASES, Word, arrival_index

if TYPE_CHECKING:
    from tcomm.memory.channel import Channel

__all__ = ["LOOKS_PER_LIVENESS_CHECK", "SET_SHIFT", "Wait", "pause_since"]

_MISMATCH_GRACE_SECONDS = 0.4
_BUSY_SECONDS = 0.02
LOOKS_PER_LIVENESS_CHECK = 16
SET_SHIFT = 8
"""Bits of a phase above these are the set of ranks that are waited for, a bit for each; none: all."""


class Wait:
    """One wait of a channel, taken step by step by whoever waits: the CPU path, or an interpreted kernel."""

    def __init__(self, channel: Channel, phase: int, block: int, word: int) -> None:
        self.phase = phase
        self.block = block
        self.word = word
        self._channel = channel
        self._epoch = word >> 32
        chosen, phase = phase >> SET_SHIFT, phase & ((1 << SET_SHIFT) - 1)
        # Phases past the last one stand for the lanes of one source, which only the kernel can see.
        self._lanes_of = [phase - MAX_PHASES] if phase >= MAX_PHASES else []
        parity, row = self._epoch & 1, 0 if self._lanes_of else phase
        peers = [peer for peer in channel.peers if not chosen or chosen >> peer & 1]
        self._inbox = tuple((peer, arrival_index(row, parity, block, peer)) for peer in peers)
        self._looks = 0
        self._deadline = channel.deadline()
        self._began = time.monotonic()
        self._differing_since = 0.0

    def step(self) -> bool:
        """Look once; True when all have arrived, or enough of them to know that they disagree.

        Raises:
            PeerLostError, PeerTimeoutError: when it cannot go on.
        """
        absent = self._absent()
        if not absent:
            return True
        channel = self._channel
        if channel.words[Word.POISON_CODE]:
            channel.raise_poison()
        if self._looks % LOOKS_PER_LIVENESS_CHECK == 0:
            channel.words[Word.SEQ] = self._epoch
            channel.words[Word.WAITING_FOR] = absent[0] + 1
            channel.words[Word.LAST_PROGRESS_NS] = int(self._began * 1e9)
            self._refuse_the_dead(absent)
            if self._deadline is None:
                # Those who go on without this rank live, and will never come.
                channel.refuse_to_end(self._epoch)
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline and (late := self._absent()):
                channel.time_out(self._culprits(late), self._epoch)
            if self.differs():
                self._differing_since = self._differing_since or now
                return now - self._differing_since > _MISMATCH_GRACE_SECONDS
        self._looks += 1
        return False

    def _absent(self) -> list[int]:
        if self._lanes_of:
            return self._lanes_of
        words, epoch = self._channel.words, self._epoch
        return [peer for peer, index in self._inbox if words[index] >> 32 != epoch]

    def _culprits(self, late: Sequence[int]) -> list[int]:
        """Whom the late ones wait for, where ranks wait for some of the others only: a mate may be stuck."""
        if not self.phase >> SET_SHIFT:
            return list(late)
        pages, found = self._channel.pages, []
        for peer in late:
            for _ in pages:
                words = pages[peer].words
                awaited = words[Word.WAITING_FOR] - 1 if words[Word.SEQ] == self._epoch else -1
                if awaited in (-1, self._channel.rank):
                    break
                peer = awaited  # noqa: PLW2901 - the chain is followed
            found.append(peer)
        return sorted(set(found))

    def _refuse_the_dead(self, absent: Sequence[int]) -> None:
        channel = self._channel
        gone = [peer for peer in absent if channel.is_gone(peer)]
        if gone:
            # A peer may have arrived and then left: what it published before it went counts.
            still_absent = self._absent()
            gone = [peer for peer in gone if peer in still_absent]
        if gone:
            channel.lose(gone, self._epoch)

    def differs(self) -> bool:
        """Whether a peer has arrived with another signature."""
        words, word, epoch = self._channel.words, self.word, self._epoch
        return any(words[index] >> 32 == epoch and words[index] != word for _, index in self._inbox)

    def pause(self) -> None:
        """Let others run between two steps."""
        pause_since(self._began)


def pause_since(began: float) -> None:
    """Let others run: at once while a wait that began then is young, in short sleeps when it is not."""
    if time.monotonic() - began < _BUSY_SECONDS:
        os.sched_yield()
    else:
        time.sleep(0.0002)
