"""The host's side of the protocol core: epochs, arrival words, bounded waits, and who is to blame.

`docs/memory-model.md` is the contract. A call takes the next epoch, publishes (epoch, signature) in every
peer's control page, waits until all peers have published the same epoch, and compares signatures.
"""

from __future__ import annotations

import array
import os
import time
from collections.abc import Sequence
from typing import NoReturn

from tcomm.errors import CollectiveMismatchError, CommError, PeerLostError, PeerTimeoutError
from tcomm.memory.control import (
    EPOCH_MASK,
    RENEWAL_MASK,
    ControlPage,
    ErrorKind,
    PoisonCode,
    Word,
    arrival_index,
    dead_word,
)
from tcomm.memory.cores import HomeCore
from tcomm.memory.descriptions import OwnDescriptions
from tcomm.memory.liveness import PeerProcess
from tcomm.memory.wait import Wait
from tcomm.signature import CallDescription

__all__ = ["Channel"]

_POISON, _EPOCH = int(Word.POISON_CODE), int(Word.EPOCH)  # members of an enum cost a tenth of a microsecond
_YIELDS = 64
_WAITS_PER_MOVE = 8


class Channel:
    """One rank's end of a group's control pages. Used by one thread at a time.

    Args:
        group: name of the group, for errors.
        rank: this process, within the group.
        pages: control page of every rank.
        processes: watcher of every rank; None for this one.
        spins: polls before a wait begins to yield, and to look at the dead and the clock.
    """

    axis_rank = 0
    """A launch of this rank works for no other."""

    def __init__(
        self,
        group: str,
        rank: int,
        pages: Sequence[ControlPage],
        processes: Sequence[PeerProcess | None],
        spins: int,
    ) -> None:
        self.group = group
        self.rank = rank
        self.world_size = len(pages)
        self.pages = tuple(pages)
        self.processes = tuple(processes)
        self.peers = tuple(peer for peer in range(self.world_size) if peer != rank)
        self.words = pages[rank].words
        self._call = CallDescription("")
        self._spins = spins
        self._home = HomeCore(rank)
        self.waits_with_yields = 0
        """Short waits that ended in a yield, since the last one that did not."""
        self._peer_words = tuple(pages[peer].words for peer in self.peers)
        # [phase * 2 + parity]: where this rank writes in a peer's page, and the words it waits for.
        self._outbox = tuple(arrival_index(p, parity, 0, rank) for p in range(2) for parity in range(2))
        self._inbox = tuple(
            tuple(arrival_index(p, parity, 0, peer) for peer in self.peers)
            for p in range(2)
            for parity in range(2)
        )
        self._descriptions = OwnDescriptions(pages[rank])
        self.breaks_off_alone = False
        """Whether the others are to go on when this rank breaks off in the middle of a call."""
        self.lanes: tuple[memoryview[int], ...] = ()
        """Flag-in-data words of this rank, by parity, while there is staging."""
        self._timeout: float | None = None
        self._started = 0.0
        self._kernel_failure: CommError | None = None
        self._kernel_wait: Wait | None = None

    # The four words a CPU algorithm is written in ------------------------------------------------

    def begin(self, call: CallDescription, timeout: float | None) -> int:
        """Take the next epoch for `call`.

        Args:
            call: what is called; put down for the peers to read.
            timeout: seconds that all waits of this epoch may take together; None: for ever, while the
                peers live.

        Raises:
            PeerLostError, PeerTimeoutError: when the group was given up before.
        """
        words = self.words
        if words[_POISON]:
            self.raise_poison()
        epoch = (words[_EPOCH] + 1) & EPOCH_MASK
        self._descriptions.point(epoch & 1, call)
        if not epoch & RENEWAL_MASK:
            self._renew(epoch)
        self._call = call
        self._timeout = timeout
        self._started = 0.0
        return epoch

    def publish(self, phase: int, word: int) -> None:
        """Tell every peer that this rank has come to `phase`, with all it wrote before."""
        index = self._outbox[phase * 2 + (word >> 32 & 1)]
        for words in self._peer_words:
            words[index] = word

    def await_peers(self, phase: int, word: int) -> None:
        """Wait until every peer has published the same word.

        Raises:
            CollectiveMismatchError: a peer's signature differs. The epoch is over, the group usable.
            PeerLostError: a peer died or left.
            PeerTimeoutError: a peer did not come in time.
        """
        words = self.words
        for index in self._inbox[phase * 2 + (word >> 32 & 1)]:
            if words[index] != word:
                polls = self._spins
                while words[index] != word:
                    polls -= 1
                    if polls < -_YIELDS:
                        self._wait(phase, word)
                        return
                    if polls < 0:
                        os.sched_yield()
                if polls < 0:
                    self.make_room()
                else:
                    self.waits_with_yields = 0

    def make_room(self) -> None:
        """Get off a core that this rank seems to share with a peer while another is free.

        A process that yields stays where it is until the scheduler balances its cores, milliseconds later;
        meanwhile every wait costs a switch. So after a few waits that ended in a yield, and then seldom, the
        thread moves to the core of its rank.
        """
        self.waits_with_yields += 1
        if self.waits_with_yields % _WAITS_PER_MOVE == 2:
            self._home.go()

    def finish(self, epoch: int) -> None:
        """End the call: its staging may be written again at the second epoch from here."""
        self.words[_EPOCH] = epoch

    def agree(self, call: CallDescription, timeout: float | None) -> int:
        """Compare signatures and do nothing else: a call of one epoch without data. **Collective.**

        Returns:
            The epoch. Descriptions of its parity stay readable until the next call but one.
        """
        epoch = self.begin(call, timeout)
        word = epoch << 32 | call.signature
        self.publish(0, word)
        self.await_peers(0, word)
        self.finish(epoch)
        if self.words[_POISON]:
            self.raise_poison()
        return epoch

    def _renew(self, epoch: int) -> None:
        """Forget what the other parity was told a whole wrap of the epoch ago."""
        other = epoch + 1 & 1
        self.pages[self.rank].renew(other, epoch)
        self.renew_lanes(other, epoch)

    def renew_lanes(self, parity: int, epoch: int) -> None:
        """Make every lane of `parity` nobody's."""
        if self.lanes:
            lanes = self.lanes[parity]
            lanes[:] = array.array("Q", [dead_word(epoch)]) * len(lanes)

    # Slow path -----------------------------------------------------------------------------------

    def _wait(self, phase: int, word: int) -> None:
        wait = Wait(self, phase, 0, word)
        try:
            while not wait.step():
                wait.pause()
        finally:
            self.words[Word.WAITING_FOR] = 0
        if wait.differs():
            self.finish(word >> 32)
            raise self.mismatch(word >> 32)

    def deadline(self) -> float | None:
        """When the waits of this call end; its clock starts at the first wait that is not short."""
        if not self._started:
            self._started = time.monotonic()
        return None if self._timeout is None else self._started + self._timeout

    def name_call(self, call: CallDescription) -> None:
        """Let errors name `call`, which takes no epoch."""
        self._call = call

    @property
    def op(self) -> str:
        """Verb of the call in progress, or of the last one."""
        return self._call.op

    @property
    def timeout(self) -> float | None:
        """Of the call in progress, in seconds."""
        return self._timeout

    def interrupt(self) -> None:
        """Give the group up because this rank broke off in the middle of a call: Ctrl-C, or a bug.

        Where the others go on without whom they lose, or have gone on without this rank, it leaves alone.
        """
        epoch = self.words[Word.EPOCH] + 1 & EPOCH_MASK
        if self.breaks_off_alone or self.words[Word.MASKED] or self.is_left_out:
            mine = self.pages[self.rank]
            mine.poison(PoisonCode.INTERRUPTED, self.rank, epoch)
            mine.leave(f"it was interrupted in the middle of call #{epoch}")
        else:
            self.give_up(PoisonCode.INTERRUPTED, self.rank, epoch)

    def give_up(self, code: PoisonCode, rank: int, seq: int) -> None:
        """Make every rank raise: now if it waits, else at its next call."""
        for page in self.pages:
            page.poison(code, rank, seq)

    @property
    def is_left_out(self) -> bool:
        """Whether ranks that this one counts on go on without it; then it has no say in who is lost."""
        theirs = [peer for peer in self.peers if not self.words[Word.LEFT_OUT] >> peer & 1]
        return any(self.pages[peer].words[Word.LEFT_OUT] >> self.rank & 1 for peer in theirs)

    def left_out(self, epoch: int) -> CommError:
        """The error of a rank that the others go on without, since that call."""
        told = (
            f"the others of group {self.group!r} have gone on without this rank, {self.rank}, since call "
            f"#{epoch}, for which it was late; call clean_mask() on every rank, or build a new group"
        )
        return self.error(PeerTimeoutError, told, epoch, [self.rank])

    def refuse_to_end(self, epoch: int) -> None:
        """Raise, for this rank alone, when it would give up a group that goes on without it."""
        if self.is_left_out:
            # What it published of that call may be there still: it takes part again by `clean_mask` only.
            self.words[Word.MASKED] = epoch + 1
            raise self.left_out(epoch)

    def raise_poison(self) -> NoReturn:
        """Raise for a group that somebody gave up."""
        words = self.words
        code, culprit, seq = (
            words[Word.POISON_CODE],
            words[Word.POISON_RANK],
            words[Word.POISON_SEQ],
        )
        raise self.poisoned(PoisonCode(code), culprit, seq)

    def poisoned(self, code: PoisonCode, culprit: int, seq: int) -> CommError:
        """The error of a group that somebody gave up."""
        if code == PoisonCode.INTERRUPTED:
            why = f"rank {culprit} was interrupted in the middle of it"
        elif culprit == self.rank:
            why = f"the others gave up waiting for this rank, {culprit}"
        else:
            why = self.blame(culprit)
        told = f"group {self.group!r} was given up at call #{seq}: {why}"
        remedy = "; build a new group of the ranks that are left"
        kind = PeerTimeoutError if code == PoisonCode.PEER_TIMEOUT else PeerLostError
        return self.error(kind, told + remedy, seq, [culprit])

    def blame(self, peer: int) -> str:
        """What is known of a rank, in a clause."""
        page, process = self.pages[peer], self.processes[peer]
        if process is None:
            return f"rank {peer} is this process"
        reason = page.leaving_reason
        if reason is not None:
            return f"rank {peer} left: {reason}"
        last = page.words[Word.EPOCH]
        word = "died" if process.is_dead() else "is silent"
        return f"rank {peer} {word} ({process.describe()}; it has completed call #{last})"

    def error(self, kind: type[CommError], message: str, seq: int, peers: Sequence[int]) -> CommError:
        """An error of this group with its fields filled in."""
        return kind(message, group=self.group, op=self.op, seq=seq, rank=self.rank, peers=peers)

    def mismatch(self, epoch: int, everyone: bool = False) -> CollectiveMismatchError:
        """The table of what each rank called at `epoch`.

        Args:
            epoch: of the call.
            everyone: all ranks are known to have begun it, though not all have told this one.
        """
        lines = [f"call #{epoch} of group {self.group!r}: the ranks called different things"]
        mine = self.pages[self.rank].description(epoch & 1)
        others = []
        for rank, page in enumerate(self.pages):
            index = arrival_index(0, epoch & 1, 0, rank)
            arrived = everyone or rank == self.rank or self.words[index] >> 32 == epoch
            theirs = page.description(epoch & 1) if arrived else None
            told = str(theirs) if theirs else ("an unreadable call" if arrived else "not arrived yet")
            lines.append(f"  rank {rank}: {told}")
            if theirs is None or mine is None or theirs.signature != mine.signature:
                others.append(rank)
        lines.append("make the ranks call the same thing; the group stays usable")
        error = self.error(CollectiveMismatchError, "\n".join(lines), epoch, others)
        assert isinstance(error, CollectiveMismatchError)
        return error

    # Kernels -------------------------------------------------------------------------------------

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Called by an interpreted kernel between two polls: 0 to go on, 1 to stop waiting."""
        wait = self._kernel_wait
        if wait is None or (wait.phase, wait.block, wait.word) != (phase, block, word):
            wait = self._kernel_wait = Wait(self, phase, block, word)
        try:
            if wait.step():
                return int(wait.differs())
            wait.pause()
        except CommError as failure:
            # The first program to fail gives the group up, and those after it find only that.
            self._kernel_failure = self._kernel_failure or failure
            return 1
        return 0

    def after_kernel(self, epoch: int, everyone: bool = False) -> None:
        """Raise what a kernel found while it waited, if anything. The kernel has advanced the epoch.

        Args:
            epoch: of the call.
            everyone: its completion takes that all ranks began it, whomever it heard of.
        """
        words = self.words
        failure, self._kernel_failure, self._kernel_wait = self._kernel_failure, None, None
        words[Word.WAITING_FOR] = 0
        kind = words[Word.ERROR_KIND]
        words[Word.ERROR_KIND] = ErrorKind.NONE
        if kind == ErrorKind.MISMATCH:
            raise self.mismatch(epoch, everyone)
        if kind == ErrorKind.TIMEOUT:
            if failure is not None:
                raise failure
            self.time_out([words[Word.ERROR_PEER]], epoch)

    def is_gone(self, peer: int) -> bool:
        """Whether a peer has left the group, or its process has ended."""
        process = self.processes[peer]
        return bool(self.pages[peer].words[Word.LEFT]) or (process is not None and process.is_dead())

    def find_gone(self) -> list[int]:
        """The peers that have left or died."""
        return [peer for peer in self.peers if self.is_gone(peer)]

    def refuse_the_lost(self) -> None:
        """Raise when the group was given up, or a peer is gone."""
        if self.words[Word.POISON_CODE]:
            self.raise_poison()
        if gone := self.find_gone():
            self.lose(gone, self.words[Word.EPOCH])

    def lose(self, peers: Sequence[int], epoch: int) -> NoReturn:
        """Give the group up because peers are dead or gone, and raise."""
        self.refuse_to_end(epoch)
        self.give_up(PoisonCode.PEER_LOST, peers[0], epoch)
        raise self.lost(peers, epoch)

    def lost(self, peers: Sequence[int], epoch: int) -> CommError:
        """The error for peers that are dead or gone."""
        told = "; ".join(self.blame(peer) for peer in peers)
        return self.error(
            PeerLostError, f"{self.op} #{epoch} of group {self.group!r} cannot complete: {told}", epoch, peers
        )

    def time_out(self, peers: Sequence[int], epoch: int) -> NoReturn:
        """Give the group up because peers are silent, and raise."""
        self.refuse_to_end(epoch)
        self.give_up(PoisonCode.PEER_TIMEOUT, peers[0], epoch)
        told = "; ".join(self.blame(peer) for peer in peers)
        raise self.error(
            PeerTimeoutError,
            f"{self.op} #{epoch} of group {self.group!r} timed out after {self._timeout:g} s on rank "
            f"{self.rank}: {told}; find out what it does, or call with a longer timeout=",
            epoch,
            peers,
        )
