"""One reader's side of a ring. `docs/queue.md` is the contract."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from tcomm.errors import (
    CommError,
    DecodeError,
    DuplicateRankError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.groups.queue.futex import order_others, sleep_while, wake_sleepers
from tcomm.groups.queue.patience import SPINS_BETWEEN_YIELDS, Patience, spin_until, spins_among
from tcomm.groups.queue.ring import (
    PIECE_BYTES,
    WITHDRAWN,
    ReaderWord,
    ShmRingBuffer,
    SlotWord,
    State,
    Word,
    namespace_word,
    watch_process,
)
from tcomm.memory.liveness import my_identity

__all__ = ["RingReader", "WithdrawnError"]

_HEAD, _READY, _CLOSED, _ASLEEP = int(Word.HEAD), int(Word.READY), int(Word.CLOSED), int(Word.ASLEEP)
_TOTAL, _OFFSET = int(SlotWord.TOTAL), int(SlotWord.OFFSET)
_FILLED, _PLACE = int(SlotWord.FILLED), int(SlotWord.PLACE)
_IDLE, _READER_ASLEEP = int(ReaderWord.IDLE_NS), int(ReaderWord.ASLEEP)
_PAUSE_SECONDS = 0.0002


class WithdrawnError(CommError):
    """The writer did not finish the message; the next one is whole. Never leaves the queue."""


class RingReader:
    """One reader's side.

    Args:
        ring: that it opened.
        index: of its line.
        rank: for messages.

    Attributes:
        taken: chunks that were released.

    Raises:
        DuplicateRankError: when another process has this line.
        PeerLostError: when the writer is gone already.
    """

    def __init__(self, ring: ShmRingBuffer, index: int, rank: int) -> None:
        self.ring = ring
        self.rank = rank
        self._words = ring.words
        self._chunks = ring.max_chunks
        self._line = ring.reader_line(index)
        self._cursor_address = ring.address(self._line)
        self.taken = 0
        self._places = ring.places
        self._fence: threading.Lock | None = threading.Lock()
        spins = spins_among(ring.n_reader + 1)
        self._short = min(PIECE_BYTES, ring.max_chunk_bytes)
        self._spins = range(min(spins, SPINS_BETWEEN_YIELDS))
        self._yields = range(spins // len(self._spins) - 1)
        self._closed = False
        if not ring.claim(index):
            pid = self._words[self._line + ReaderWord.PID]
            ring.close()
            raise DuplicateRankError(f"rank {rank} of the queue is taken by pid {pid}; open it once per rank")
        pid, start, namespace = self._words[Word.PID : Word.PID + 3].tolist()
        self._watch = watch_process(ring, (pid, start, namespace), True)
        self._claim()

    def _claim(self) -> None:
        me, words, line = my_identity(), self._words, self._line
        words[line + ReaderWord.PID], words[line + ReaderWord.START_TIME] = me.pid, me.start_time
        words[line + ReaderWord.NAMESPACE] = namespace_word(me)
        words[line + ReaderWord.IDLE_NS] = time.monotonic_ns()
        words[line + ReaderWord.STATE] = State.OPEN

    def has_chunk(self) -> bool:
        """Whether the next chunk has come, or the ring is damaged, as `look` will say."""
        words, cursor = self._words, self.taken
        if words[self._places[cursor % self._chunks][1]] == cursor + 1:
            return True
        # A chunk has its number before the head counts it, so a reader may be one ahead of the head.
        return not cursor - 1 <= words[_HEAD] <= cursor

    def take(self) -> memoryview | None:
        """The next message, if it is one chunk and comes at once; else `look` knows.

        One longer than a piece may still be coming; see `wait_filled`.
        """
        words, cursor = self._words, self.taken
        slot, number, length = self._places[cursor % self._chunks]
        if words[number] != cursor + 1 and not self._spin(number, cursor + 1):
            return None
        nbytes = words[length]
        if nbytes > self._short and words[number + _PLACE] == 1:
            slot = self.ring.shared
        return slot[:nbytes] if 0 < nbytes <= len(slot) else None

    def _spin(self, index: int, value: int) -> bool:
        """As `spin_until`, without a call for each look: here a microsecond counts."""
        words, spins = self._words, self._spins
        # There is time to look at a clock where the reader waits, and none where it has something to do.
        words[self._line + _IDLE] = time.monotonic_ns()
        for _ in spins:
            if words[index] == value:
                return True
        for _ in self._yields:
            # Where the scheduler has put both sides on one core, the writer could not come otherwise.
            os.sched_yield()
            for _ in spins:
                if words[index] == value:
                    return True
        return False

    def wait(self, patience: Patience) -> None:
        """Wait for the next chunk.

        Raises:
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when none comes.
        """
        try:
            if not spin_until(self.has_chunk, 0):
                self._sleep_until(self.has_chunk, _HEAD, patience, "wrote nothing")
        finally:
            self._words[self._line + _IDLE] = time.monotonic_ns()

    def wait_until_ready(self, patience: Patience) -> None:
        """Wait for the writer to have all its readers. Raises as `wait` does."""
        words = self._words
        self._sleep_until(lambda: bool(words[_READY]), _READY, patience, "did not get all its readers")
        if not self.ring.is_fenced:
            self._fence = None

    def _sleep_until(
        self, is_there: Callable[[], bool], index: int, patience: Patience, complaint: str
    ) -> None:
        """Sleep until something is there, after which the word at `index` changes."""
        words, asleep, address = self._words, self._line + _READER_ASLEEP, self.ring.address(index)
        while True:
            seen = words[index]
            if is_there():
                return
            seconds = self._refuse_to_wait(is_there, patience, complaint)
            if is_there():
                return
            words[asleep] = 1
            order_others()
            sleep_while(address, seen, seconds)
            words[asleep] = 0

    def _refuse_to_wait(self, is_there: Callable[[], bool], patience: Patience, complaint: str) -> float:
        """Seconds to wait before the next look; raises where that is in vain."""
        self._refuse_gone(is_there)
        patience.refuse_cancelled()
        seconds = patience.slice()
        if seconds <= 0 and not is_there():
            raise PeerTimeoutError(
                f"the writer ({self._describe_writer()}) {complaint} within {patience.seconds:g} s",
                peers=self._writer_rank(),
            )
        return seconds

    def wait_filled(self, patience: Callable[[], Patience], nbytes: int) -> int:
        """Wait until `nbytes` of the long message at hand are there; how many are.

        Args:
            patience: the call's, asked for where it is needed.
            nbytes: from the beginning.

        Raises:
            WithdrawnError: when its writer did not finish it.
            DecodeError: when the slot says what cannot be.
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when no more come.
        """
        words, cursor = self._words, self.taken
        _, line, length = self._places[cursor % self._chunks]
        filled = line + _FILLED
        # Read once: a writer that is interrupted takes back what it said.
        there = words[filled]
        if nbytes <= there <= words[length]:
            return int(there)

        def is_there() -> bool:
            return not 0 <= words[filled] < nbytes

        if not spin_until(is_there, len(self._spins)):
            while not is_there():
                # A writer finishes a message before it begins the next one.
                if words[_HEAD] > cursor + 1 and not is_there():
                    raise DecodeError(
                        f"a message has {words[filled]} bytes of {nbytes}, and will get no more"
                    )
                seconds = self._refuse_to_wait(is_there, patience(), "stopped in the middle of a message")
                time.sleep(max(0.0, min(seconds, _PAUSE_SECONDS)))
        there = words[filled]
        if there == WITHDRAWN:
            raise WithdrawnError("the writer did not finish this message")
        if not nbytes <= there <= words[length]:
            raise DecodeError(f"a message of {words[length]} bytes says that {there} of them are there")
        return int(there)

    def _refuse_gone(self, is_there: Callable[[], bool]) -> None:
        left = bool(self._words[_CLOSED])
        dead = not left and self._watch is not None and self._watch.is_dead()
        if self._closed:
            raise GroupClosedError("the queue is shut down")
        # What was written before the end counts.
        if not (left or dead) or is_there():
            return
        if dead:
            self.ring.unlink()
        told = "shut the queue down" if left else "died"
        raise PeerLostError(f"the writer ({self._describe_writer()}) {told}", peers=self._writer_rank())

    def _describe_writer(self) -> str:
        rank = self._writer_rank()
        known = self._watch.describe() if self._watch is not None else "pid unknown"
        return f"rank {rank[0]}, {known}" if rank else known

    def _writer_rank(self) -> tuple[int, ...]:
        rank = self._words[Word.RANK]
        return (rank,) if rank >= 0 else ()

    def look(self) -> tuple[int, int, memoryview]:
        """The next chunk: bytes of its message, its offset, and its bytes; of a long one, where they will be.

        Raises:
            DecodeError: when the slot says what cannot be; it is to be released.
            CommError: when the ring does.
        """
        words, cursor = self._words, self.taken
        slot, line, length = self._places[cursor % self._chunks]
        head, number = words[_HEAD], words[line]
        if not -1 <= head - cursor <= self._chunks:
            raise CommError(
                f"the memory of the queue is damaged: {head} chunks were written, it says, and "
                f"{cursor} were taken; make another queue"
            )
        if number != cursor + 1:
            raise DecodeError(f"a slot says that it holds chunk {number}, not {cursor + 1}")
        is_whole = words[length] >= 0
        nbytes = abs(words[length])
        is_shared = is_whole and nbytes > self._short and words[line + _PLACE] == 1
        memory = self.ring.shared if is_shared else slot
        if nbytes > len(memory):
            raise DecodeError(f"a slot of {len(memory)} bytes says that it holds {nbytes}")
        total, offset = (nbytes, 0) if is_whole else (words[line + _TOTAL], words[line + _OFFSET])
        return total, offset, memory[:nbytes]

    def release(self) -> None:
        """Give the slot of the chunk back."""
        words, line, fence = self._words, self._line, self._fence
        self.taken = words[line] = self.taken + 1
        if fence is not None:
            # A full barrier, as the writer's.
            fence.acquire(False)
            fence.release()
        if words[_ASLEEP]:
            wake_sleepers(self._cursor_address)

    def close(self) -> None:
        """Say that this reader reads no more, and wake its waits. May be called twice."""
        self._closed = True
        self._words[self._line + ReaderWord.STATE] = State.LEFT
        for index in (_HEAD, _READY, self._line):
            wake_sleepers(self.ring.address(index))
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self.ring.close()
