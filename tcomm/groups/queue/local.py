"""The two sides of a ring: its writer, and one of its readers. `docs/queue.md` is the contract."""

from __future__ import annotations

import logging
import os
import threading
import time

from tcomm.errors import (
    CommError,
    DecodeError,
    DuplicateRankError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.groups.queue.futex import sleep_while, wake_sleepers
from tcomm.groups.queue.patience import LOOK_SECONDS, Patience, spin_until, spins_among
from tcomm.groups.queue.ring import LINE, ReaderWord, ShmRingBuffer, SlotWord, State, Word, namespace_word
from tcomm.memory.liveness import Identity, PeerProcess, hold_lock, my_identity

__all__ = ["RingReader", "RingWriter"]

logger = logging.getLogger("tcomm")

_SPINS_BETWEEN_YIELDS = 250
_HEAD, _READY, _CLOSED, _ASLEEP = int(Word.HEAD), int(Word.READY), int(Word.CLOSED), int(Word.ASLEEP)
_LENGTH, _TOTAL, _OFFSET = int(SlotWord.LENGTH), int(SlotWord.TOTAL), int(SlotWord.OFFSET)
_PROGRESS, _READER_ASLEEP = int(ReaderWord.PROGRESS_NS), int(ReaderWord.ASLEEP)


def _watch(ring: ShmRingBuffer, words: tuple[int, int, int], has_lock: bool) -> PeerProcess | None:
    """Watch a process by the pid, start time and namespace that it wrote down, or by its lock on the file."""
    me = my_identity()
    pid, start_time, namespace = words
    is_near = namespace == namespace_word(me)
    if not is_near and not has_lock:
        return None
    # A second opening: a lock never excludes the description that it belongs to.
    fd = os.open(f"/proc/self/fd/{ring.fd}", os.O_RDWR | os.O_CLOEXEC)
    return PeerProcess(Identity(pid, start_time, me.namespace if is_near else ""), fd)


class RingWriter:
    """The writer's side.

    Args:
        ring: that it made.
        ranks: of the readers, for messages.
        drop_dead: go on without readers that are dead or have left.
    """

    def __init__(self, ring: ShmRingBuffer, ranks: list[int], drop_dead: bool) -> None:
        hold_lock(ring.fd)
        self.ring = ring
        self.ranks = ranks
        self.head = 0
        self._words = ring.words
        self._chunks = ring.max_chunks
        self._lines = [ring.reader_line(index) for index in range(ring.n_reader)]
        self._asleep = [line + _READER_ASLEEP for line in self._lines]
        self._head_address = ring.address(_HEAD)
        self._places = ring.places
        self._fence = threading.Lock()
        self._living = list(range(ring.n_reader))
        self._watches: dict[int, PeerProcess | None] = {}
        self._drop_dead = drop_dead
        self._floor = 0
        self._spins = min(spins_among(ring.n_reader + 1), _SPINS_BETWEEN_YIELDS)
        self._looked = 0.0

    def has_room(self) -> bool:
        """Whether the next chunk has a slot."""
        if self.head - self._floor < self._chunks:
            return True
        words, lines = self._words, self._lines
        self._floor = min((words[lines[index]] for index in self._living), default=self.head)
        return self.head - self._floor < self._chunks

    def has_room_now(self) -> bool:
        """As `has_room`; looks after the readers first, if that was not done just now. Raises as `look`."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self.look()
        return self.head - self._floor < self._chunks or self.has_room()

    def put(self, message: bytes) -> bool:
        """Give out a message of one chunk; False: there is no room. Raises as `look`."""
        if not self.has_room_now():
            return False
        nbytes = len(message)
        self._places[self.head % self._chunks][0][:nbytes] = message
        self.publish(nbytes, nbytes, 0)
        return True

    def look(self) -> None:
        """Look after the readers; one that is gone is dropped where that was asked for.

        Raises:
            PeerLostError: when a reader is gone.
        """
        for index in list(self._living):
            told = self._why_gone(index)
            self.refuse_closed()
            if told and self._drop_dead:
                logger.warning("the queue goes on without the reader of rank %d: %s", self.ranks[index], told)
                self._living.remove(index)
            elif told:
                raise PeerLostError(
                    f"the reader of rank {self.ranks[index]} {told}; drop_dead_readers=True goes on without",
                    peers=(self.ranks[index],),
                )

    def _why_gone(self, index: int) -> str:
        line = self._lines[index]
        state = self._words[line + ReaderWord.STATE]
        if state == State.ABSENT:
            return ""
        if state == State.LEFT:
            return f"has left (pid {self._words[line + ReaderWord.PID]})"
        if index not in self._watches:
            first = line + ReaderWord.PID
            pid, start, namespace = self._words[first : first + 3].tolist()
            self._watches[index] = _watch(self.ring, (pid, start, namespace), False)
        watch = self._watches[index]
        return f"died ({watch.describe()})" if watch is not None and watch.is_dead() else ""

    def wait_for_room(self, patience: Patience) -> bool:
        """Wait for a slot; False when the deadline passed first. Raises as `look` does, or when closed."""
        if spin_until(self.has_room, self._spins):
            return True
        while not self.has_room():
            self.refuse_closed()
            self.look()
            if self.has_room():
                return True
            seconds = patience.slice()
            if seconds <= 0:
                return False
            line = self._lines[min(self._living, key=lambda index: self._words[self._lines[index]])]
            self._sleep(line, seconds)
        return True

    def _sleep(self, line: int, seconds: float) -> None:
        cursor = self._words[line]
        self._words[_ASLEEP] = 1
        if not self.has_room():
            sleep_while(self.ring.address(line), cursor, seconds)
        self._words[_ASLEEP] = 0

    def wait_until_open(self, patience: Patience) -> None:
        """Wait until every reader has opened the ring, then remove its name.

        Raises:
            PeerTimeoutError: when one did not. PeerLostError: when one came and is gone.
        """
        while absent := [i for i in self._living if self._words[self._lines[i] + ReaderWord.STATE] == 0]:
            self.refuse_closed()
            seconds = patience.slice()
            if seconds <= 0:
                ranks = tuple(self.ranks[index] for index in absent)
                raise PeerTimeoutError(
                    f"the readers of ranks {', '.join(map(str, ranks))} did not open the queue within "
                    f"{patience.seconds:g} s",
                    peers=ranks,
                )
            time.sleep(min(seconds, 0.001))
        self.ring.unlink()
        self.look()

    def publish_ready(self) -> None:
        """Let the readers' `wait_until_ready` return."""
        self._words[_READY] = 1
        wake_sleepers(self.ring.address(_READY))

    def slot(self) -> memoryview:
        """Where the next chunk goes, once there is room."""
        return self.ring.slots[self.head % self._chunks]

    def publish(self, length: int, total: int, offset: int) -> None:
        """Give out what is in `slot()`: its words, then the head, then a call to whoever sleeps."""
        words, head, fence = self._words, self.head, self._fence
        _, line, total_word, offset_word = self._places[head % self._chunks]
        words[line] = length
        words[total_word] = total
        words[offset_word] = offset
        self.head = words[_HEAD] = head + 1
        # A full barrier, also where a signal came between these two the last time.
        fence.acquire(False)
        fence.release()
        for asleep in self._asleep:
            if words[asleep]:
                wake_sleepers(self._head_address)
                break

    def describe_lag(self) -> tuple[str, tuple[int, ...]]:
        """Who holds the slot that is needed next, and what is known of it."""
        words, now = self._words, time.monotonic_ns()
        index = min(self._living, key=lambda index: words[self._lines[index]])
        line = self._lines[index]
        cursor = words[line]
        if words[line + ReaderWord.STATE] == State.ABSENT:
            state = "has not opened the queue"
        else:
            self._why_gone(index)
            watch = self._watches[index]
            known = watch.describe() if watch else f"pid {words[line + ReaderWord.PID]}"
            silent = (now - words[line + _PROGRESS]) / 1e9
            state = f"({known}) took its last chunk {silent:.1f} s ago"
        told = (
            f"the reader of rank {self.ranks[index]} {state}; it is {self.head - cursor} chunks behind and "
            f"holds slot {cursor % self._chunks} of {self._chunks}"
        )
        return told, (self.ranks[index],)

    def refuse_closed(self) -> None:
        """Raise GroupClosedError when this side has shut down."""
        if self._words[_CLOSED]:
            raise GroupClosedError("the queue is shut down")

    def close(self) -> None:
        """Say that nothing more comes, and wake everybody. May be called twice."""
        self._words[_CLOSED] = 1
        for index in (_HEAD, _READY, *self._lines):
            wake_sleepers(self.ring.address(index))
        for watch in self._watches.values():
            if watch is not None:
                watch.close()
        self._watches = {}
        self.ring.close()


class RingReader:
    """One reader's side.

    Args:
        ring: that it opened.
        index: of its line.
        rank: for messages.

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
        self._cursor = 0
        self._places = ring.places
        self._fence = threading.Lock()
        spins = spins_among(ring.n_reader + 1)
        self._spins = range(min(spins, _SPINS_BETWEEN_YIELDS))
        self._yields = range(spins // len(self._spins) - 1)
        self._closed = False
        if not ring.claim(index):
            pid = self._words[self._line + ReaderWord.PID]
            ring.close()
            raise DuplicateRankError(f"rank {rank} of the queue is taken by pid {pid}; open it once per rank")
        pid, start, namespace = self._words[Word.PID : Word.PID + 3].tolist()
        self._watch = _watch(ring, (pid, start, namespace), True)
        self._claim()

    def _claim(self) -> None:
        me, words, line = my_identity(), self._words, self._line
        words[line + ReaderWord.PID], words[line + ReaderWord.START_TIME] = me.pid, me.start_time
        words[line + ReaderWord.NAMESPACE] = namespace_word(me)
        words[line + ReaderWord.PROGRESS_NS] = time.monotonic_ns()
        words[line + ReaderWord.STATE] = State.OPEN

    def has_chunk(self) -> bool:
        """Whether the next chunk has come."""
        return bool(self._words[_HEAD] != self._cursor)

    def take(self) -> memoryview | None:
        """The next message, in its slot, if it is one chunk and comes at once; else `look` knows."""
        words, cursor = self._words, self._cursor
        if words[_HEAD] == cursor and not self._spin():
            return None
        slot, line, total_word, offset_word = self._places[cursor % self._chunks]
        length = words[line]
        is_whole = length == words[total_word] and not words[offset_word]
        if is_whole and 0 < length <= len(slot) and 0 < words[_HEAD] - cursor <= self._chunks:
            return slot[:length]
        return None

    def _spin(self) -> bool:
        """As `spin_until`, without a call for each look: here a microsecond counts."""
        words, cursor, spins = self._words, self._cursor, self._spins
        for _ in spins:
            if words[_HEAD] != cursor:
                return True
        for _ in self._yields:
            # Where the scheduler has put both sides on one core, the writer could not come otherwise.
            os.sched_yield()
            for _ in spins:
                if words[_HEAD] != cursor:
                    return True
        return False

    def wait(self, patience: Patience) -> None:
        """Wait for the next chunk.

        Raises:
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when none comes.
        """
        if not spin_until(self.has_chunk, 0):
            self._wait_for(_HEAD, self._cursor, patience, "wrote nothing")

    def wait_until_ready(self, patience: Patience) -> None:
        """Wait for the writer to have all its readers. Raises as `wait` does."""
        self._wait_for(_READY, 0, patience, "did not get all its readers")

    def _wait_for(self, index: int, value: int, patience: Patience, complaint: str) -> None:
        words, asleep = self._words, self._line + _READER_ASLEEP
        address = self.ring.address(index)
        while words[index] == value:
            self._refuse_gone(index, value)
            patience.refuse_cancelled()
            seconds = patience.slice()
            if words[index] != value:
                break
            if seconds <= 0:
                raise PeerTimeoutError(
                    f"the writer ({self._describe_writer()}) {complaint} within {patience.seconds:g} s",
                    peers=self._writer_rank(),
                )
            words[asleep] = 1
            sleep_while(address, value, seconds)
            words[asleep] = 0

    def _refuse_gone(self, index: int, value: int) -> None:
        left = bool(self._words[_CLOSED])
        dead = not left and self._watch is not None and self._watch.is_dead()
        if self._closed:
            raise GroupClosedError("the queue is shut down")
        # What was written before the end counts.
        if not (left or dead) or self._words[index] != value:
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
        """The next chunk: bytes of its message, its offset, and its bytes in the slot.

        Raises:
            DecodeError: when the slot says what cannot be; it is to be released.
            CommError: when the ring does.
        """
        words, cursor = self._words, self._cursor
        if not 0 < words[_HEAD] - cursor <= self._chunks:
            raise CommError(
                f"the memory of the queue is damaged: {words[_HEAD]} chunks were written, it says, and "
                f"{cursor} were taken; make another queue"
            )
        slot = cursor % self._chunks
        line = self.ring.slots_begin + LINE * slot
        length = words[line]
        if not 0 <= length <= self.ring.max_chunk_bytes:
            raise DecodeError(f"a slot of {self.ring.max_chunk_bytes} bytes says that it holds {length}")
        return words[line + _TOTAL], words[line + _OFFSET], self.ring.slots[slot][:length]

    def release(self) -> None:
        """Give the slot of the chunk back."""
        words, line, fence = self._words, self._line, self._fence
        self._cursor = words[line] = self._cursor + 1
        words[line + _PROGRESS] = time.monotonic_ns()
        # A full barrier, as in `RingWriter.publish`.
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
