"""A ring of slots in shared memory, for one writer and several readers. `docs/queue.md` is the contract."""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import os
import stat
from collections.abc import Iterator

from tcomm.config import Config
from tcomm.errors import CapabilityError, ConfigError, RendezvousError
from tcomm.groups.queue.futex import can_be_ordered
from tcomm.memory.liveness import Identity, PeerProcess, hold_lock, my_identity
from tcomm.memory.shm import Segment, remove_orphans, why_unordered

__all__ = [
    "LINE",
    "PIECE_BYTES",
    "WITHDRAWN",
    "ReaderWord",
    "RingHandle",
    "ShmRingBuffer",
    "SlotWord",
    "State",
    "Word",
    "namespace_word",
    "watch_process",
]

LINE = 8
"""Words of a cache line."""
PIECE_BYTES = 64 * 1024
"""A longer message that fits a slot is read piece by piece while it is written."""
WITHDRAWN = -1
"""What FILLED says of a message that its writer did not finish."""
_SHARED_BYTES = 2 << 20
_MAGIC, _VERSION = 0x74636F6D6D716575, 3
_PAGE, _ALIGNMENT = 4096, 64
_MAX_NBYTES = 1 << 40
RingHandle = tuple[int, int, int, str]
"""Readers, bytes of a slot, slots, path."""


@enum.unique
class Word(enum.IntEnum):
    """Index of each single word."""

    MAGIC = 0
    VERSION = 1
    READERS = 2
    CHUNK_BYTES = 3
    CHUNKS = 4
    PID = 5
    START_TIME = 6
    NAMESPACE = 7
    HEAD = 8
    CLOSED = 9
    READY = 10
    RANK = 11
    FENCED = 12
    ASLEEP = 16
    READERS_BEGIN = 24


@enum.unique
class ReaderWord(enum.IntEnum):
    """Index of each word in the two lines of a reader."""

    CURSOR = 0
    STATE = 1
    PID = 2
    START_TIME = 3
    NAMESPACE = 4
    IDLE_NS = 5
    # In a line of its own, for the writer looks at it after each chunk and it seldom changes.
    ASLEEP = 8


@enum.unique
class SlotWord(enum.IntEnum):
    """Index of each word in the line of a slot."""

    NUMBER = 0
    LENGTH = 1
    TOTAL = 2
    OFFSET = 3
    FILLED = 4
    PLACE = 5


@enum.unique
class State(enum.IntEnum):
    """What a reader's STATE says."""

    ABSENT = 0
    OPEN = 1
    LEFT = 2


def namespace_word(identity: Identity) -> int:
    """63 bits of the place where a pid means something."""
    digest = hashlib.blake2b(identity.namespace.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ShmRingBuffer:
    """The memory of a ring: made by its writer, opened by its readers.

    Args:
        n_reader: readers that map it.
        max_chunk_bytes: bytes of a slot.
        max_chunks: slots.
        name: None to make one; the path of one that exists to open it.

    Attributes:
        n_reader, max_chunk_bytes, max_chunks: as given.
        is_creator: whether this made it.
        words: all before the slots, as 64-bit integers.
        slots: the slots, as unsigned bytes.
        shared: memory that a long message has in place of its slot's, if it is free: it stays in the caches.
        places: each slot, with the indices of its words for number and length.
        fd: of the file, open until `close`; the creator holds its lock.

    Raises:
        ConfigError: when an argument makes no sense.
        CapabilityError: when this machine lacks the memory, or the order of stores that a ring needs.
        RendezvousError: when there is no such ring under `name`.
    """

    def __init__(self, n_reader: int, max_chunk_bytes: int, max_chunks: int, name: str | None = None) -> None:
        _check_sizes(n_reader, max_chunk_bytes, max_chunks)
        self.n_reader, self.max_chunk_bytes, self.max_chunks = n_reader, max_chunk_bytes, max_chunks
        self.is_creator = name is None
        self.slots_begin = self.reader_line(n_reader)
        stride = -(-max_chunk_bytes // _ALIGNMENT) * _ALIGNMENT
        begin = -(-8 * (self.slots_begin + LINE * max_chunks) // _PAGE) * _PAGE
        shared_nbytes = min(max_chunk_bytes, _SHARED_BYTES) if max_chunk_bytes > PIECE_BYTES else 0
        nbytes = begin + stride * max_chunks + shared_nbytes
        if reason := why_unordered():
            raise CapabilityError(f"no queue in shared memory: {reason}")
        self._segment = self._create(nbytes) if name is None else _open(name, nbytes)
        self.fd = self._segment.fd
        memory = self._segment.map(nbytes)
        self._address = memory.data_ptr()
        view = memory.numpy().data
        self.words = view[:begin].cast("q")
        ends = [begin + stride * index for index in range(max_chunks)]
        self.slots = [view[end : end + max_chunk_bytes] for end in ends]
        self.shared = view[nbytes - shared_nbytes : nbytes]
        self.places = [
            (slot, line + SlotWord.NUMBER, line + SlotWord.LENGTH)
            for slot, line in zip(self.slots, range(self.slots_begin, len(self.words), LINE), strict=False)
        ]
        if self.is_creator:
            self._describe()
        else:
            self._refuse_another()
        if not can_be_ordered():
            self.words[Word.FENCED] = 1

    @property
    def is_fenced(self) -> bool:
        """Whether somebody cannot be ordered by who goes to sleep; final once all have opened the ring."""
        return bool(self.words[Word.FENCED])

    def handle(self) -> RingHandle:
        """What a reader needs to open it: the arguments, with the name."""
        return (self.n_reader, self.max_chunk_bytes, self.max_chunks, self._segment.path)

    @contextlib.contextmanager
    def get_data(self, current_idx: int) -> Iterator[memoryview]:
        """The bytes of a slot, [max_chunk_bytes]."""
        yield self.slots[self._check(current_idx)]

    @contextlib.contextmanager
    def get_metadata(self, current_idx: int) -> Iterator[memoryview]:
        """The words of a slot, [8]; `SlotWord` says which."""
        begin = self.slots_begin + LINE * self._check(current_idx)
        yield self.words[begin : begin + LINE]

    def address(self, index: int) -> int:
        """Where word `index` lies in this process."""
        return self._address + 8 * index

    def reader_line(self, index: int) -> int:
        """The first word of a reader."""
        return int(Word.READERS_BEGIN) + 2 * LINE * index

    def claim(self, index: int) -> bool:
        """Take the place of a reader, until `close`; False where another opening has or had it."""
        with contextlib.suppress(BlockingIOError):
            # The writer holds the first byte. Of two that come at once, one gets theirs.
            hold_lock(self.fd, 1 + index)
            return bool(self.words[self.reader_line(index) + ReaderWord.STATE] == State.ABSENT)
        return False

    def unlink(self) -> None:
        """Remove the name. May be called twice, and by a reader whose writer is gone."""
        with contextlib.suppress(OSError):
            named, mine = os.stat(self._segment.path), os.fstat(self.fd)
            if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
                self._segment.unlink()

    def close(self) -> None:
        """Give the descriptor back, and remove the name if this made it. The memory ends with its views."""
        if self.fd >= 0:
            if self.is_creator:
                self.unlink()
            self._segment.close()
            self.fd = -1

    def _check(self, index: int) -> int:
        if not 0 <= index < self.max_chunks:
            raise ConfigError(f"slot {index} of {self.max_chunks} slots")
        return index

    def _create(self, nbytes: int) -> Segment:
        directory = Config.from_environment().shm_dir
        remove_orphans(directory)
        try:
            return Segment.create(directory, nbytes)
        except OSError as error:
            available = "unknown"
            with contextlib.suppress(OSError):
                room = os.statvfs(directory)
                available = str(room.f_bavail * room.f_frsize)
            raise CapabilityError(
                f"no memory for a queue: {error.strerror}: needed {nbytes} bytes in {directory}, available "
                f"{available}; make the file system larger (docker run --shm-size, or mount -o "
                "remount,size=...), name another in TCOMM_SHM_DIR, or give a smaller max_chunk_bytes or "
                "max_chunks"
            ) from error

    def _describe(self) -> None:
        me, words = my_identity(), self.words
        words[Word.VERSION], words[Word.READERS] = _VERSION, self.n_reader
        words[Word.CHUNK_BYTES], words[Word.CHUNKS] = self.max_chunk_bytes, self.max_chunks
        words[Word.PID], words[Word.START_TIME] = me.pid, me.start_time
        words[Word.NAMESPACE] = namespace_word(me)
        words[Word.MAGIC] = _MAGIC

    def _refuse_another(self) -> None:
        expected = [_MAGIC, _VERSION, self.n_reader, self.max_chunk_bytes, self.max_chunks]
        if self.words[: len(expected)].tolist() != expected:
            path = self._segment.path
            self.close()
            raise RendezvousError(
                f"{path} is no ring of {self.n_reader} readers and {self.max_chunks} x "
                f"{self.max_chunk_bytes} bytes; run the same version of tcomm in every process"
            )


def watch_process(ring: ShmRingBuffer, words: tuple[int, int, int], has_lock: bool) -> PeerProcess | None:
    """Watch a process by the pid, start time and namespace that it wrote down, or by its lock on the file."""
    me = my_identity()
    pid, start_time, namespace = words
    is_near = namespace == namespace_word(me)
    if not is_near and not has_lock:
        return None
    # A second opening: a lock never excludes the description that it belongs to.
    fd = os.open(f"/proc/self/fd/{ring.fd}", os.O_RDWR | os.O_CLOEXEC)
    return PeerProcess(Identity(pid, start_time, me.namespace if is_near else ""), fd)


def _check_sizes(n_reader: int, max_chunk_bytes: int, max_chunks: int) -> None:
    sizes = {"n_reader": n_reader, "max_chunk_bytes": max_chunk_bytes, "max_chunks": max_chunks}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"{name}={size!r} of a queue is no positive integer")
    if max_chunk_bytes * max_chunks > _MAX_NBYTES:
        raise ConfigError(f"a ring of {max_chunks} x {max_chunk_bytes} bytes is larger than any memory")


def _open(path: str, nbytes: int) -> Segment:
    """Open a file that this user made. Raises RendezvousError when there is none, or it is too small."""
    problem = ""
    try:
        segment = Segment(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError as error:
        problem = os.strerror(error.errno or errno.ENOENT)
    else:
        status = os.fstat(segment.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_size < nbytes:
            problem = "it is not what its writer made"
            segment.close()
    if problem:
        raise RendezvousError(
            f"cannot open the ring {path}: {problem}; its writer must live, and be this user on this node"
        )
    return segment
