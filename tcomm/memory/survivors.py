"""Going on without ranks that are late or dead, agreed on call by call. Protocol: `docs/moe/elastic.md`.

A wait in which all arrive costs a look at one more row of words. Where somebody does not, whoever finds out
opens a round in every page, looks whether anybody has heard of the late rank, and proposes; the first
proposal of a round is the verdict of all, also of those who had everything.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from typing import Protocol

from tcomm.errors import ConfigError
from tcomm.memory.channel import Channel
from tcomm.memory.control import EPOCH_MASK, FAULTS, Word, arrival_index
from tcomm.memory.verdicts import Verdicts
from tcomm.memory.wait import pause_since

__all__ = ["Survivors"]

logger = logging.getLogger("tcomm")

_ROUND_SHIFT = 8
_ROUND_MASK = 0xFF
_SECONDS_FOR_A_PROPOSAL = 0.5
_MOST_DELAYS = 2
"""Timeouts after which one does not look any more whether a late rank waits for somebody."""


class Kernels(Protocol):
    """What kernels know of their ranks, apart from the host."""

    def leave_out(self, ranks: int) -> None:
        """Let kernels leave ranks out from now on, a bit for each."""
        ...

    def epoch_of(self, rank: int) -> int:
        """Calls that the kernels of a rank have completed."""
        ...


class Survivors:
    """The ranks of a channel that take part. Used by one thread at a time.

    Args:
        channel: of the group.
        directory: memory file system that the ranks share; verdicts lie there for two calls.
        kernels: those of the channel's ranks, where they work by other pages than the channel's.
    """

    def __init__(self, channel: Channel, directory: str, kernels: Kernels | None = None) -> None:
        self._channel = channel
        self._kernels = kernels
        self._rank = channel.rank
        self._verdicts = Verdicts(channel, directory)
        self._prefix = self._verdicts.prefix
        self.masked: set[int] = set()
        """Ranks that are not waited for, and get nothing."""
        self.faults: list[tuple[int, tuple[int, ...]]] = []
        """(call, ranks) of each verdict that masked somebody."""

    @property
    def masks_late(self) -> bool:
        """Whether a rank that is late or dead is masked, instead of the group being given up."""
        return self._channel.breaks_off_alone

    @masks_late.setter
    def masks_late(self, chosen: bool) -> None:
        self._channel.breaks_off_alone = chosen

    @property
    def is_needed(self) -> bool:
        """Whether calls have to go through this, and not through the channel alone."""
        return self.masks_late or bool(self.masked) or self._channel.is_left_out

    @property
    def active(self) -> list[int]:
        """Peers that take part."""
        return [peer for peer in self._channel.peers if peer not in self.masked]

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Mask a rank, or let it take part again; the same on every rank that goes on, between two calls.

        Raises:
            ConfigError: when it is this rank, none, or has made other calls meanwhile.
        """
        channel = self._channel
        if type(rank) is not int or not 0 <= rank < channel.world_size or rank == self._rank:
            raise ConfigError(f"rank={rank!r}: give another rank, 0 to {channel.world_size - 1}")
        if is_masked:
            self.masked.add(rank)
            self._show_masked()
            return
        theirs, mine = map(self.epoch_of, (rank, self._rank))
        has_raised = bool(channel.pages[rank].words[Word.MASKED])
        if rank in self.masked and (channel.is_gone(rank) or theirs != mine or has_raised):
            raise ConfigError(
                f"rank {rank} has completed call #{theirs} and this rank #{mine}"
                f"{', and raised in the next' if has_raised else ''}: it cannot just go on; "
                f"call clean_mask() on every rank ({channel.blame(rank)})"
            )
        self.masked.discard(rank)
        self._show_masked()

    def epoch_of(self, rank: int) -> int:
        """Calls that a rank has completed."""
        if self._kernels is not None:
            return self._kernels.epoch_of(rank)
        return self._channel.pages[rank].words[Word.EPOCH]

    def forget(self) -> None:
        """Let all take part again. Every rank does so, between two calls, and nobody begins one before."""
        words = self._channel.words
        for opener in range(self._channel.world_size):
            words[FAULTS + opener] = 0
        words[Word.MASKED] = 0
        self.masked.clear()
        self._show_masked()
        self.faults.clear()

    def refuse_if_masked(self) -> None:
        """Raise when the others go on without this rank."""
        if told := self._channel.words[Word.MASKED]:
            raise self._channel.left_out(told - 1)

    def refuse_if_left_out(self) -> None:
        """Raise when another rank does not take this one for a part of the group."""
        if self._channel.is_left_out:
            raise self._channel.left_out(self.epoch_of(self._rank) + 1)

    def publish(self, word: int) -> None:
        """Tell those who take part that this rank has written what it gives."""
        index = arrival_index(0, word >> 32 & 1, 0, self._rank)
        for peer in self.active:
            self._channel.pages[peer].words[index] = word

    def await_peers(self, word: int, timeout: float | None) -> None:
        """Wait until those who take part have published that epoch, or are masked.

        Afterwards the words of all who take part are in this rank's page, where a kernel looks for them.

        Raises:
            CollectiveMismatchError: a peer's signature differs.
            PeerLostError, PeerTimeoutError: a peer does not come, and late ones are not masked.
            PeerTimeoutError: this rank is masked itself.
        """
        try:
            self._await_peers(word, timeout)
        finally:
            self._channel.words[Word.WAITING_FOR] = 0

    def _await_peers(self, word: int, timeout: float | None) -> None:
        epoch, number, began = word >> 32, 0, time.monotonic()
        patience = _Patience(self._channel, epoch, timeout)
        heard_of: set[int] = set()
        while True:
            absent = self._absent(epoch, heard_of)
            # After the arrivals: whoever opens a round looks at them afterwards.
            if self._is_open(epoch, number):
                self._apply(epoch, self._verdict(epoch, number, heard_of, patience), heard_of)
                number += 1
                continue
            if not absent:
                break
            self._refuse_the_end()
            if timeout is None:
                # Those who go on without this rank live, and will never come.
                self._channel.refuse_to_end(epoch)
            self._show(epoch, absent)
            if late := self._late(epoch, heard_of, patience):
                self._open(epoch, number, late)
                continue
            pause_since(began)
        self._refuse_other_calls(word, heard_of)
        for peer in heard_of - self.masked:
            # It may have told others only: its data is there all the same.
            self._channel.words[arrival_index(0, epoch & 1, 0, peer)] = word
        self._verdicts.drop(epoch)

    def close(self) -> None:
        """Remove what nobody will read any more."""
        self._verdicts.close(self.active)

    def _show_masked(self) -> None:
        self._channel.words[Word.LEFT_OUT] = _bits(self.masked)
        if self._kernels is not None:
            self._kernels.leave_out(_bits(self.masked))

    # One wait ------------------------------------------------------------------------------------

    def _has_arrived(self, rank: int, peer: int, epoch: int) -> bool:
        """Whether `peer` has told `rank` of that epoch."""
        index = arrival_index(0, epoch & 1, 0, peer)
        return self._channel.pages[rank].words[index] >> 32 == epoch

    def _absent(self, epoch: int, heard_of: set[int]) -> list[int]:
        return [p for p in self.active if p not in heard_of and not self._has_arrived(self._rank, p, epoch)]

    def _show(self, epoch: int, absent: list[int]) -> None:
        """Let others see that this rank waits: it is late because somebody else is."""
        words = self._channel.words
        words[Word.SEQ] = epoch
        words[Word.WAITING_FOR] = absent[0] + 1

    def _late(self, epoch: int, heard_of: set[int], patience: _Patience) -> list[int]:
        """Those who are not coming: dead, or absent past their deadline."""
        absent = self._absent(epoch, heard_of)
        late = [peer for peer in absent if self._channel.is_gone(peer) or patience.is_over(peer)]
        # A peer may have arrived and then left.
        still_absent = self._absent(epoch, heard_of) if late else []
        return [peer for peer in late if peer in still_absent]

    def _refuse_the_end(self) -> None:
        self.refuse_if_masked()
        if self._channel.words[Word.POISON_CODE]:
            self._channel.raise_poison()

    def _refuse_other_calls(self, word: int, heard_of: set[int]) -> None:
        epoch = word >> 32
        if any(self._told_by(peer, epoch) not in {word, None} for peer in self.active):
            self._channel.finish(epoch)
            raise self._channel.mismatch(epoch, everyone=bool(heard_of))

    def _told_by(self, peer: int, epoch: int) -> int | None:
        """The word of `peer` for that epoch, whomever it told; None where it told nobody."""
        index = arrival_index(0, epoch & 1, 0, peer)
        words = (page.words[index] for page in (self._channel.pages[self._rank], *self._channel.pages))
        return next((word for word in words if word >> 32 == epoch), None)

    # Rounds --------------------------------------------------------------------------------------

    def _is_open(self, epoch: int, number: int) -> bool:
        words = self._channel.words
        openers = (opener for opener in range(self._channel.world_size) if opener not in self.masked)
        asked = [words[FAULTS + opener] for opener in openers]
        if any(a >> _ROUND_SHIFT == epoch and (a & _ROUND_MASK) > number for a in asked):
            return True
        # Who is a call ahead may have opened a round there since, and keeps one word for both.
        ahead = epoch + 1 & EPOCH_MASK
        is_ahead = any(a >> _ROUND_SHIFT == ahead for a in asked)
        return is_ahead and self._verdicts.exists(epoch, number)

    def _open(self, epoch: int, number: int, late: list[int]) -> None:
        channel = self._channel
        # They do not wait for this rank either, and it has no say in whom they go on without.
        channel.refuse_to_end(epoch)
        if not self.masks_late:
            if gone := [peer for peer in late if channel.is_gone(peer)]:
                channel.lose(gone, epoch)
            channel.time_out(late, epoch)
        for page in channel.pages:
            page.words[FAULTS + self._rank] = epoch << _ROUND_SHIFT | number + 1
        # A yield is a fence: the arrivals that are looked at next are read after these stores.
        os.sched_yield()

    def _verdict(
        self, epoch: int, number: int, heard_of: set[int], patience: _Patience
    ) -> tuple[set[int], set[int]]:
        """(masked, heard of) of a round: what the first proposal says, which may be this rank's."""
        began = time.monotonic()
        is_mine = self._channel.words[FAULTS + self._rank] == epoch << _ROUND_SHIFT | number + 1
        while True:
            self._refuse_the_end()
            told = self._verdicts.find(epoch, number)
            if told is None and (is_mine or time.monotonic() - began > _SECONDS_FOR_A_PROPOSAL):
                late = set(self._late(epoch, heard_of, patience))
                known = {peer for peer in late if self._is_known(peer, epoch)}
                proposal = f"{_bits(late - known):x}.{_bits(known):x}"
                told = self._verdicts.propose(proposal, epoch, number)
            if told is not None:
                # The others may have removed it meanwhile, and this rank made it anew.
                self._refuse_the_end()
                masked, heard = (int(part, 16) for part in told.split("."))
                return self._ranks(masked), self._ranks(heard)
            pause_since(began)

    def _is_known(self, peer: int, epoch: int) -> bool:
        """Whether anybody has heard of `peer`: then all that it gave is there, for everybody."""
        return self._told_by(peer, epoch) is not None

    def _ranks(self, bits: int) -> set[int]:
        return {rank for rank in range(self._channel.world_size) if bits >> rank & 1}

    def _apply(self, epoch: int, verdict: tuple[set[int], set[int]], heard_of: set[int]) -> None:
        masked, heard = verdict
        heard_of |= heard
        if self._rank in masked:
            raise self._channel.left_out(epoch)
        fresh = sorted(masked - self.masked)
        if not fresh:
            return
        self.masked.update(fresh)
        self._show_masked()
        self.faults.append((epoch, tuple(fresh)))
        channel = self._channel
        told = "; ".join(channel.blame(peer) for peer in fresh)
        logger.warning(
            "%s #%d of group %r goes on without ranks %s: %s", channel.op, epoch, channel.group, fresh, told
        )
        for peer in fresh:
            channel.pages[peer].words[Word.MASKED] = epoch + 1


class _Patience:
    """Until when one wait bears with whom.

    A rank that itself still waits in the call before is late for another's sake: its time begins when it was
    last seen to, though not for ever, as it may have stopped while it did.
    """

    def __init__(self, channel: Channel, epoch: int, timeout: float | None) -> None:
        self._pages = channel.pages
        self._before = epoch - 1 & EPOCH_MASK
        self._timeout = timeout
        self._began = time.monotonic()
        self._since: dict[int, float] = {}

    def is_over(self, peer: int) -> bool:
        """Whether `peer`, who is absent, is late."""
        if self._timeout is None:
            return False
        now, words = time.monotonic(), self._pages[peer].words
        if words[Word.WAITING_FOR] and words[Word.SEQ] == self._before:
            self._since[peer] = min(now, self._began + _MOST_DELAYS * self._timeout)
        return now >= self._since.get(peer, self._began) + self._timeout


def _bits(ranks: Iterable[int]) -> int:
    return sum(1 << rank for rank in ranks)
