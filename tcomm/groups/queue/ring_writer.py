"""The writer's side of a ring. `docs/queue.md` is the contract."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from tcomm.errors import GroupClosedError, PeerLostError, PeerTimeoutError
from tcomm.groups.queue.chunks import cut
from tcomm.groups.queue.futex import order_others, sleep_while, wake_sleepers
from tcomm.groups.queue.patience import LOOK_SECONDS, SPINS_BETWEEN_YIELDS, Patience, spin_until, spins_among
from tcomm.groups.queue.ring import (
    PIECE_BYTES,
    WITHDRAWN,
    ReaderWord,
    ShmRingBuffer,
    SlotWord,
    State,
    Word,
    watch_process,
)
from tcomm.memory.liveness import PeerProcess, hold_lock

__all__ = ["RingWriter"]

logger = logging.getLogger("tcomm")

_HEAD, _READY, _CLOSED, _ASLEEP = int(Word.HEAD), int(Word.READY), int(Word.CLOSED), int(Word.ASLEEP)
_LENGTH, _TOTAL, _OFFSET = int(SlotWord.LENGTH), int(SlotWord.TOTAL), int(SlotWord.OFFSET)
_FILLED, _PLACE = int(SlotWord.FILLED), int(SlotWord.PLACE)
_IDLE, _READER_ASLEEP = int(ReaderWord.IDLE_NS), int(ReaderWord.ASLEEP)


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
        self._fence: threading.Lock | None = threading.Lock()
        self._living = list(range(ring.n_reader))
        self._watches: dict[int, PeerProcess | None] = {}
        self._drop_dead = drop_dead
        self._floor = 0
        self._shared_until = 0
        self._spins = min(spins_among(ring.n_reader + 1), SPINS_BETWEEN_YIELDS)
        self._looked = 0.0

    def has_room(self) -> bool:
        """Whether the next chunk has a slot."""
        return self.head - self._floor < self._chunks or self.head - self._find_floor() < self._chunks

    def _find_floor(self) -> int:
        """Chunks that all readers have taken."""
        words, lines, floor = self._words, self._lines, self.head
        for index in self._living:
            cursor = words[lines[index]]
            if cursor < floor:
                floor = cursor
        self._floor = floor
        return floor

    def has_room_now(self) -> bool:
        """As `has_room`; looks after the readers first, if that was not done just now. Raises as `look`."""
        self._look_now_and_then(self.head + 1)
        return self.has_room()

    def _look_now_and_then(self, end: int) -> None:
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self.look(end)

    def put(self, message: bytes) -> bool:
        """Give out a message of one chunk and one piece; False: there is no room.

        Raises as `look`; then the others may have the message.
        """
        head = self.head
        if head - self._floor >= self._chunks and not self.has_room_now():
            return False
        slot, number, length = self._places[head % self._chunks]
        nbytes = len(message)
        slot[:nbytes] = message
        self._words[length] = nbytes
        self._give_out(number)
        # Behind the message, on which readers work meanwhile. Who has taken it may have left since.
        self._look_now_and_then(self.head)
        if self.head - self._floor >= self._chunks:
            # For the next message, which then need not ask.
            self._find_floor()
        return True

    def stream(self, parts: Sequence[bytes | memoryview], nbytes: int) -> None:
        """Give a message of one chunk out and write it then, so that readers copy what is there meanwhile.

        There is room. When this raises before all is there, readers pass the message over.
        """
        words, (slot, line, length) = self._words, self._places[self.head % self._chunks]
        is_shared = nbytes <= len(self.ring.shared) and self._find_floor() >= self._shared_until
        target, filled = self.ring.shared if is_shared else slot, 0
        if is_shared:
            self._shared_until = self.head + 1
        if len(parts[0]) <= PIECE_BYTES:
            # What a reader has to understand first: it does so while the rest is written.
            filled = len(parts[0])
            target[:filled], parts = parts[0], parts[1:]
        words[length], words[line + _PLACE], words[line + _FILLED] = nbytes, is_shared, filled
        try:
            self._give_out(line)
            for pieces in cut(parts, PIECE_BYTES):
                for piece in pieces:
                    target[filled : filled + len(piece)] = piece
                    filled += len(piece)
                words[line + _FILLED] = filled
        except BaseException:
            # What is there as a whole stays: one reader may have taken it, so the others have to.
            if words[line + _FILLED] != nbytes:
                words[line + _FILLED] = WITHDRAWN
            raise

    def look(self, end: int) -> None:
        """Look after the readers; one that is gone is dropped where that was asked for.

        Args:
            end: who has taken all chunks before this one may be gone.

        Raises:
            PeerLostError: when a reader is gone.
        """
        for index in list(self._living):
            told = self._why_gone(index)
            if not told or self._words[self._lines[index]] >= end:
                continue
            self.refuse_closed()
            if self._drop_dead:
                logger.warning("the queue goes on without the reader of rank %d: %s", self.ranks[index], told)
                self._living.remove(index)
            else:
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
            self._watches[index] = watch_process(self.ring, (pid, start, namespace), False)
        watch = self._watches[index]
        return f"died ({watch.describe()})" if watch is not None and watch.is_dead() else ""

    def wait_for_room(self, patience: Patience) -> bool:
        """Wait for a slot; False when the deadline passed first. Raises as `look` does, or when closed."""
        if spin_until(self.has_room, self._spins):
            return True
        while not self.has_room():
            self.refuse_closed()
            self.look(self.head + 1)
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
        order_others()
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
        self.look(self.head + 1)

    def publish_ready(self) -> None:
        """Let the readers' `wait_until_ready` return."""
        if not self.ring.is_fenced:
            self._fence = None
        self._words[_READY] = 1
        wake_sleepers(self.ring.address(_READY))

    def slot(self) -> memoryview:
        """Where the next chunk goes, once there is room."""
        return self.ring.slots[self.head % self._chunks]

    def publish(self, nbytes: int, total: int, offset: int) -> None:
        """Give out what is in `slot()`: bytes of it, of the message, and where in the message they begin."""
        words, (_, line, length) = self._words, self._places[self.head % self._chunks]
        words[length] = nbytes if nbytes == total else -nbytes
        words[line + _TOTAL], words[line + _OFFSET] = total, offset
        words[line + _PLACE], words[line + _FILLED] = 0, nbytes
        self._give_out(line)

    def _give_out(self, number: int) -> None:
        """Number the slot, for readers who look; then the head and a call, for readers who sleep."""
        words, fence = self._words, self._fence
        self.head = words[number] = words[_HEAD] = self.head + 1
        if fence is not None:
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
            busy = (now - words[line + _IDLE]) / 1e9
            state = f"({known}) last waited for a chunk {busy:.1f} s ago"
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
