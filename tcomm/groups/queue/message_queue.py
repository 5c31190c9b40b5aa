"""`MessageQueue`: objects from one process to several. `docs/queue.md` is the contract."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tcomm.config import Config, EngineConfig, resolve_timeout
from tcomm.errors import CommError, ConfigError, DecodeError, GroupClosedError, QueueFullError
from tcomm.groups.queue.chunks import Assembler, cut
from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.local import RingReader, RingWriter
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.remote import REMOTE_CHUNK_BYTES, RemoteReader, RemoteReaders
from tcomm.groups.queue.ring import ShmRingBuffer, Word
from tcomm.objects.codec import Encoded, decode, encode

if TYPE_CHECKING:
    import torch.distributed as dist

    from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["MessageQueue"]

_Writer = RingWriter | RemoteReaders
_Reader = RingReader | RemoteReader


class MessageQueue:
    """One writer, many readers; every reader gets every message, in order.

    Made by the writer with this constructor, and by each reader with `create_from_handle`; or on all ranks
    of a group at once with `create_from_process_group`. One thread at a time uses an object.

    Args:
        n_reader: all readers.
        n_local_reader: those on this node.
        local_reader_ranks: their ranks; None: 0, 1, ...
        max_chunk_bytes: bytes of a slot; a longer message takes several.
        max_chunks: slots.
        connect_ip: address of this host for the remote readers; None: TCOMM_HOST_IP, else 127.0.0.1.
        drop_dead_readers: go on for the living when a reader dies or leaves.
        writer_rank: of this process, for messages; -1: unknown.

    Raises:
        ConfigError: when an argument makes no sense, or the address needs a secret.
        CapabilityError: when there is no memory for the ring; says needed and available.
    """

    def __init__(
        self,
        n_reader: int,
        n_local_reader: int,
        local_reader_ranks: list[int] | None = None,
        max_chunk_bytes: int = 1024 * 1024 * 24,
        max_chunks: int = 10,
        connect_ip: str | None = None,
        *,
        drop_dead_readers: bool = False,
        writer_rank: int = -1,
    ) -> None:
        ranks = list(range(n_local_reader)) if local_reader_ranks is None else list(local_reader_ranks)
        if not 0 <= n_local_reader <= n_reader or len(ranks) != n_local_reader:
            raise ConfigError(
                f"{n_local_reader} local of {n_reader} readers, with local ranks {ranks}; give one rank for "
                "each local reader, and no more of them than readers"
            )
        self._reader: _Reader | None = None
        self._local: RingWriter | None = None
        self._remote: RemoteReaders | None = None
        chunk_bytes = (
            max_chunk_bytes if n_local_reader == n_reader else min(max_chunk_bytes, REMOTE_CHUNK_BYTES)
        )
        if n_local_reader:
            ring = ShmRingBuffer(n_local_reader, chunk_bytes, max_chunks)
            ring.words[Word.RANK] = writer_rank
            self._local = RingWriter(ring, ranks, drop_dead_readers)
        handle = Handle(ranks, self._local.ring.handle() if self._local else None)
        try:
            if n_reader > n_local_reader:
                host = connect_ip or EngineConfig.from_environment().host_ip or "127.0.0.1"
                count = n_reader - n_local_reader
                self._remote = RemoteReaders(host, count, max_chunks, drop_dead_readers)
                handle.remote_subscribe_addr, handle.remote_addr_ipv6 = _url(*self._remote.address)
        except BaseException:
            if self._local is not None:
                self._local.close()
            raise
        self._chunk_bytes = chunk_bytes
        self._begin(handle, writer_rank, [side for side in (self._local, self._remote) if side is not None])

    def _begin(self, handle: Handle, rank: int, sides: list[_Writer] | list[_Reader]) -> None:
        self._handle = handle
        self._rank = rank
        self._sides = sides
        self._assembler = Assembler()
        self._pid = os.getpid()
        self._seconds = resolve_timeout(Config.from_environment().timeout)
        self._finalizer = weakref.finalize(self, _close_all, sides, self._pid)

    @staticmethod
    def create_from_handle(handle: Handle, rank: int) -> MessageQueue:
        """The queue of a reader: local where `rank` is among the handle's, else remote.

        Raises:
            RendezvousError: when there is no such ring. DuplicateRankError: when it was opened for `rank`.
            ConfigError: when the queue has no remote readers and `rank` is not local.
        """
        queue = MessageQueue.__new__(MessageQueue)
        queue._local = queue._remote = None
        if handle.buffer_handle is not None and rank in handle.local_reader_ranks:
            ring = ShmRingBuffer(*handle.buffer_handle)
            queue._reader = RingReader(ring, handle.local_reader_ranks.index(rank), rank)
        elif handle.remote_subscribe_addr is not None:
            host, _, port = handle.remote_subscribe_addr.removeprefix("tcp://").rpartition(":")
            queue._reader = RemoteReader(host.strip("[]"), int(port), rank)
        else:
            raise ConfigError(f"rank {rank} is none of the readers {handle.local_reader_ranks} of the queue")
        queue._begin(handle, rank, [queue._reader])
        return queue

    @staticmethod
    def create_from_process_group(
        pg: dist.ProcessGroup | StatelessProcessGroup,
        max_chunk_bytes: int,
        max_chunks: int,
        writer_rank: int = 0,
        external_writer_handle: Handle | None = None,
        blocking: bool = True,
        *,
        drop_dead_readers: bool = False,
        timeout: float | None = None,
    ) -> MessageQueue:
        """A queue from one rank to all others of a group. **Collective.**

        Args:
            pg: a torch group with a backend for the CPU, or a stateless one.
            max_chunk_bytes: bytes of a slot.
            max_chunks: slots.
            writer_rank: a group rank.
            external_writer_handle: on `writer_rank`, of a queue whose writer is none of the group; all
                ranks of the group, this one too, then read that queue.
            blocking: return when all are ready; else call `wait_until_ready` later.
            drop_dead_readers: as of the constructor.
            timeout: seconds for all of it; None: the profile of TCOMM_TIMEOUT.

        Raises:
            ConfigError: when there is no such rank. RendezvousError: on every rank, when one failed.
            PeerTimeoutError, PeerLostError: when a rank did not come.
        """
        from tcomm.groups.queue.creation import queue_of_group

        queue = queue_of_group(
            pg, max_chunk_bytes, max_chunks, writer_rank, external_writer_handle, drop_dead_readers, timeout
        )
        if blocking:
            queue.wait_until_ready(timeout)
        return queue

    @staticmethod
    def create_from_process_group_single_reader(
        pg: dist.ProcessGroup | StatelessProcessGroup,
        max_chunk_bytes: int,
        max_chunks: int,
        reader_rank: int = 0,
        blocking: bool = False,
        *,
        timeout: float | None = None,
    ) -> tuple[MessageQueue, list[Handle]]:
        """A queue of its own for every rank, all with one reader. **Collective.**

        Args:
            pg: as of `create_from_process_group`.
            max_chunk_bytes: bytes of a slot.
            max_chunks: slots.
            reader_rank: a group rank.
            blocking: wait until the reader has opened this rank's queue.
            timeout: seconds for all of it; None: the profile of TCOMM_TIMEOUT.

        Returns:
            This rank's queue, and on the reader the handles of all ranks; it opens each with
            `create_from_handle(handle, 0)`. Empty elsewhere.

        Raises:
            ConfigError, RendezvousError, PeerTimeoutError, PeerLostError: as `create_from_process_group`.
        """
        from tcomm.groups.queue.creation import queues_to_one_reader

        queue, handles = queues_to_one_reader(pg, max_chunk_bytes, max_chunks, reader_rank, timeout)
        if blocking:
            queue.wait_until_ready(timeout)
        return queue, handles

    def export_handle(self) -> Handle:
        """What the readers need; plain data, encodable."""
        return self._handle

    def wait_until_ready(self, timeout: float | str | None = None) -> None:
        """Wait until all readers are there; on a reader, until the writer says so. **Collective.**

        Before the first message. The ring's name is gone afterwards.

        Raises:
            PeerTimeoutError, PeerLostError, RendezvousError: when somebody does not come.
        """
        patience = Patience(timeout, self._seconds)
        with self._telling("wait_until_ready"):
            if self._reader is not None:
                self._reader.wait_until_ready(patience)
                return
            for side in self._writers():
                side.wait_until_open(patience)
            for side in self._writers():
                side.publish_ready()

    def enqueue(self, obj: object, timeout: float | str | None = None) -> None:
        """Give an object to all readers. Waits only while one of them has no room.

        Args:
            obj: what `tcomm.objects.codec` takes; it may change as soon as this returns.
            timeout: seconds; None: the profile of TCOMM_TIMEOUT.

        Raises:
            ConfigError: when this is a reader, or something in the object may not travel; says where.
            QueueFullError: when a reader lags; says who. The object is not sent, and the queue goes on.
            PeerLostError: when a reader is gone. GroupClosedError: when the queue is shut down.
        """
        if self._reader is not None:
            raise ConfigError("Only writers can enqueue")
        encoded = encode(obj)
        try:
            self._refuse_closed()
            local = self._local
            if local is None or self._remote is not None or encoded.nbytes > self._chunk_bytes:
                self._enqueue_in_chunks(encoded, Patience(timeout, self._seconds))
                return
            local.look_now_and_then()
            if not local.has_room():
                self._make_room(Patience(timeout, self._seconds))
            encoded.write_into(local.slot())
            local.publish(encoded.nbytes, encoded.nbytes, 0)
        except CommError as error:
            self._sign(error, "enqueue")
            raise

    def dequeue(
        self,
        timeout: float | str | None = None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> object:
        """The next object. Its arrays and tensors are this process's own.

        Args:
            timeout: seconds; None: the profile of TCOMM_TIMEOUT.
            cancel: ends the wait when it is set, by another thread.
            indefinite: wait as long as the writer lives.

        Raises:
            ConfigError: when this is the writer.
            PeerTimeoutError: when nothing came in time. PeerLostError: when the writer is gone.
            DecodeError: when the message is none; the next call gets the next message.
            CommError: "cancelled". GroupClosedError: when the queue is shut down here.
        """
        try:
            chunk, is_whole = self._next_message(timeout, cancel, indefinite)
            if not is_whole:
                return decode(chunk, borrow=True)
            try:
                value = decode(chunk)
            except DecodeError:
                self._source().release()
                raise
            self._source().release()
        except CommError as error:
            self._sign(error, "dequeue")
            raise
        return value

    @contextlib.contextmanager
    def borrow(
        self,
        timeout: float | str | None = None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> Iterator[object]:
        """As `dequeue`, without a copy: arrays and tensors are views of the slot while the block runs.

        The slot goes back at its end, also when it raises; then the views show what is written next.
        """
        with self._telling("borrow"):
            chunk, is_whole = self._next_message(timeout, cancel, indefinite)
            try:
                value = decode(chunk, borrow=True)
            except DecodeError:
                if is_whole:
                    self._source().release()
                raise
        try:
            yield value
        finally:
            if is_whole:
                self._source().release()

    @contextlib.contextmanager
    def acquire_write(self, timeout: float | str | None = None) -> Iterator[memoryview]:
        """The next slot, to be filled by hand: [max_chunk_bytes]. Given out at the end of the block.

        When the block raises, nothing is given out and the slot is free again. Read by `acquire_read`.

        Raises:
            ConfigError: when this is a reader.
            QueueFullError, PeerLostError, GroupClosedError: as `enqueue` does.
        """
        if self._reader is not None:
            raise ConfigError("Only writers can acquire write")
        with self._telling("acquire_write"):
            self._make_room(Patience(timeout, self._seconds))
        slot = self._local.slot() if self._local is not None else memoryview(bytearray(self._chunk_bytes))
        yield slot
        with self._telling("acquire_write"):
            if self._remote is not None:
                self._remote.publish([slot], len(slot), 0)
            if self._local is not None:
                self._local.publish(len(slot), len(slot), 0)

    @contextlib.contextmanager
    def acquire_read(
        self,
        timeout: float | str | None = None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> Iterator[memoryview]:
        """The bytes of the next chunk, in its slot. The slot goes back at the end, also when the block raises.

        Raises:
            ConfigError: when this is the writer.
            PeerTimeoutError, PeerLostError, CommError, GroupClosedError: as `dequeue` does.
        """
        if self._reader is None:
            raise ConfigError("Only readers can acquire read")
        with self._telling("acquire_read"):
            self._reader.wait(Patience(timeout, self._seconds, cancel, indefinite))
            _, _, chunk = self._look()
        try:
            yield chunk
        finally:
            self._reader.release()

    def broadcast_object(self, obj: object = None) -> object:
        """The writer's object on everybody. **Collective.** `enqueue` on the writer, `dequeue` on readers."""
        if self._reader is not None:
            return self.dequeue()
        self.enqueue(obj)
        return obj

    def shutdown(self) -> None:
        """Leave the queue and wake everybody who waits. May be called twice, and while another thread waits.

        After the writer's, readers get what was written, then a PeerLostError.
        """
        self._finalizer()

    def _writers(self) -> Iterator[_Writer]:
        return (side for side in (self._local, self._remote) if side is not None)

    def _source(self) -> _Reader:
        if self._reader is None:
            raise ConfigError("Only readers can dequeue")
        return self._reader

    def _refuse_closed(self) -> None:
        if not self._finalizer.alive:
            raise GroupClosedError("the queue is shut down")
        if self._pid != os.getpid():
            raise GroupClosedError(f"the queue belongs to process {self._pid}; make another after a fork")

    def _make_room(self, patience: Patience) -> None:
        self._refuse_closed()
        for side in self._writers():
            if not side.has_room() and not side.wait_for_room(patience):
                told, ranks = side.describe_lag()
                raise QueueFullError(
                    f"the queue is full and stayed so for {patience.seconds:g} s: {told}. Nothing was lost; "
                    "the object was not sent. Give a longer timeout or more chunks, or see what that reader does",
                    peers=ranks,
                )

    def _enqueue_in_chunks(self, encoded: Encoded, patience: Patience) -> None:
        offset = 0
        for pieces in cut(encoded.parts, self._chunk_bytes):
            self._make_room(patience)
            nbytes = 0
            if self._remote is not None:
                self._remote.publish(pieces, encoded.nbytes, offset)
            for piece in pieces:
                if self._local is not None:
                    self._local.slot()[nbytes : nbytes + len(piece)] = piece
                nbytes += len(piece)
            if self._local is not None:
                self._local.publish(nbytes, encoded.nbytes, offset)
            offset += nbytes

    def _next_message(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> tuple[memoryview, bool]:
        """A whole message, and whether it lies in a slot that is still to be released."""
        self._refuse_closed()
        source, patience = self._source(), None
        while True:
            if not source.has_chunk():
                patience = patience or Patience(timeout, self._seconds, cancel, indefinite)
                source.wait(patience)
            total, offset, chunk = self._look()
            if not offset and total == len(chunk):
                self._assembler.drop()
                return chunk, True
            try:
                message = self._assembler.add(total, offset, chunk)
            finally:
                source.release()
            if message is not None:
                return message, False

    def _look(self) -> tuple[int, int, memoryview]:
        source = self._source()
        try:
            return source.look()
        except DecodeError:
            self._assembler.drop()
            source.release()
            raise

    @contextlib.contextmanager
    def _telling(self, op: str) -> Iterator[None]:
        try:
            self._refuse_closed()
            yield
        except CommError as error:
            self._sign(error, op)
            raise

    def _sign(self, error: CommError, op: str) -> None:
        error.group, error.op, error.rank = error.group or "queue", error.op or op, self._rank


def _close_all(sides: list[_Writer] | list[_Reader], pid: int) -> None:
    # A forked child has these objects, too, and its parent goes on using them.
    if os.getpid() == pid:
        for side in sides:
            side.close()


def _url(host: str, port: int) -> tuple[str, bool]:
    is_ipv6 = ":" in host
    return f"tcp://[{host}]:{port}" if is_ipv6 else f"tcp://{host}:{port}", is_ipv6
