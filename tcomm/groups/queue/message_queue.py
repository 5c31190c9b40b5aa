"""`MessageQueue`: objects from one process to several. `docs/queue.md` is the contract."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from tcomm.config import EngineConfig
from tcomm.errors import CommError, ConfigError, GroupClosedError
from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.patience import Patience, default_seconds
from tcomm.groups.queue.receiving import Receiver
from tcomm.groups.queue.remote import REMOTE_CHUNK_BYTES, RemoteReader, RemoteReaders, parse_url
from tcomm.groups.queue.ring import ShmRingBuffer, Word
from tcomm.groups.queue.ring_reader import RingReader
from tcomm.groups.queue.ring_writer import RingWriter
from tcomm.groups.queue.sending import Sender
from tcomm.objects.codec import encode_flat, encode_tagged

if TYPE_CHECKING:
    import torch.distributed as dist

    from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["MessageQueue"]

_Side = RingWriter | RingReader | RemoteReaders | RemoteReader
_process = os.getpid()
"""This process, without a system call for each message."""


def _after_fork() -> None:
    global _process  # noqa: PLW0603 - of this process alone
    _process = os.getpid()


os.register_at_fork(after_in_child=_after_fork)


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
        if not 0 <= n_local_reader <= n_reader or len(set(ranks)) != n_local_reader:
            raise ConfigError(
                f"{n_local_reader} local of {n_reader} readers, with local ranks {ranks}; give each local "
                "reader a rank of its own, and no more of them than readers"
            )
        chunk_bytes = (
            max_chunk_bytes if n_local_reader == n_reader else min(max_chunk_bytes, REMOTE_CHUNK_BYTES)
        )
        local, remote, handle = None, None, Handle(ranks)
        with contextlib.ExitStack() as on_failure:
            if n_local_reader:
                ring = ShmRingBuffer(n_local_reader, chunk_bytes, max_chunks)
                ring.words[Word.RANK] = writer_rank
                local = RingWriter(ring, ranks, drop_dead_readers)
                on_failure.callback(local.close)
                handle.buffer_handle = ring.handle()
            if n_reader > n_local_reader:
                host = connect_ip or EngineConfig.from_environment().host_ip or "127.0.0.1"
                remote = RemoteReaders(host, n_reader - n_local_reader, max_chunks, drop_dead_readers)
                handle.remote_subscribe_addr, handle.remote_addr_ipv6 = remote.url
            on_failure.pop_all()
        self._begin(handle, writer_rank, Sender(local, remote, chunk_bytes, default_seconds()), None)

    def _begin(self, handle: Handle, rank: int, sender: Sender | None, receiver: Receiver | None) -> None:
        self._handle = handle
        self._rank = rank
        self._sender = sender
        self._receiver = receiver
        self._process = _process
        sides: list[_Side] = [receiver.source] if receiver is not None else []
        sides += sender.sides if sender is not None else []
        self._finalizer = weakref.finalize(self, _close_all, sides, _process)

    @staticmethod
    def create_from_handle(handle: Handle, rank: int) -> MessageQueue:
        """The queue of a reader: local where `rank` is among the handle's, else remote.

        Raises:
            RendezvousError: when there is no such ring. DuplicateRankError: when it was opened for `rank`.
            ConfigError: when `rank` is not local and the queue has no remote readers, or no address for them.
        """
        source: RingReader | RemoteReader
        if handle.buffer_handle is not None and rank in handle.local_reader_ranks:
            ring = ShmRingBuffer(*handle.buffer_handle)
            source = RingReader(ring, handle.local_reader_ranks.index(rank), rank)
        elif handle.remote_subscribe_addr is not None:
            source = RemoteReader(*parse_url(handle.remote_subscribe_addr), rank)
        else:
            raise ConfigError(f"rank {rank} is none of the readers {handle.local_reader_ranks} of the queue")
        queue = MessageQueue.__new__(MessageQueue)
        queue._begin(handle, rank, None, Receiver(source, default_seconds()))
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
        patience = Patience(timeout, default_seconds())
        with self._telling("wait_until_ready"):
            if self._receiver is not None:
                self._receiver.source.wait_until_ready(patience)
            if self._sender is not None:
                self._sender.wait_until_ready(patience)

    def enqueue(self, obj: object, timeout: float | str | None = None) -> None:
        """Give an object to all readers. Waits only while one of them has no room.

        Args:
            obj: what `tcomm.objects.codec` takes; it may change as soon as this returns.
            timeout: seconds; None: the profile of TCOMM_TIMEOUT.

        Raises:
            ConfigError: when this is a reader, or something in the object may not travel; says where.
            QueueFullError: when a reader lags; says who. The object is not sent, and the queue goes on.
            PeerLostError: when a reader is gone; the others may have the object.
            GroupClosedError: when the queue is shut down.
        """
        sender = self._sender if self._process == _process else None
        sender = sender or self._sending("enqueue")
        flat = encode_flat(obj)
        try:
            if flat is not None:
                sender.send_flat(flat, timeout)
            else:
                sender.send(encode_tagged(obj), timeout)
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
        receiver = self._receiver if self._process == _process else None
        receiver = receiver or self._receiving("dequeue")
        try:
            return receiver.next_value(timeout, cancel, indefinite)
        except CommError as error:
            self._sign(error, "dequeue")
            raise

    @contextlib.contextmanager
    def borrow(
        self,
        timeout: float | str | None = None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> Iterator[object]:
        """As `dequeue`, without a copy: arrays and tensors are views of the slot while the block runs.

        The slot goes back at its end, also when it raises; then the views show what is written next. Until
        then this reader reads nothing else.
        """
        receiver = self._receiving("dequeue")
        with self._telling("borrow"):
            value, in_slot = receiver.next_borrowed(timeout, cancel, indefinite)
        try:
            receiver.lend(in_slot)
            yield value
        finally:
            _take_back(receiver)

    @contextlib.contextmanager
    def acquire_write(self, timeout: float | str | None = None) -> Iterator[memoryview]:
        """The next slot, to be filled by hand: [max_chunk_bytes]. Given out at the end of the block.

        When the block raises, nothing is given out and the slot is free again. Read by `acquire_read`.

        Raises:
            ConfigError, QueueFullError, PeerLostError, GroupClosedError: as `enqueue` does.
        """
        sender = self._sending("acquire write")
        with self._telling("acquire_write"):
            slot = sender.slot(timeout)
        try:
            sender.is_lent = True
            yield slot
            with self._telling("acquire_write"):
                sender.publish_slot(slot)
        finally:
            sender.is_lent = False

    @contextlib.contextmanager
    def acquire_read(
        self,
        timeout: float | str | None = None,
        cancel: threading.Event | None = None,
        indefinite: bool = False,
    ) -> Iterator[memoryview]:
        """The bytes of the next chunk, in its slot, which goes back at the end, also when the block raises.

        Raises:
            ConfigError, PeerTimeoutError, PeerLostError, CommError, GroupClosedError: as `dequeue` does.
        """
        receiver = self._receiving("acquire read")
        with self._telling("acquire_read"):
            chunk = receiver.next_chunk(timeout, cancel, indefinite)
        try:
            receiver.lend(True)
            yield chunk
        finally:
            _take_back(receiver)

    def broadcast_object(self, obj: object = None) -> object:
        """The writer's object on everybody. **Collective.** An `enqueue` there, a `dequeue` here."""
        if self._receiver is not None:
            return self.dequeue()
        self.enqueue(obj)
        return obj

    def shutdown(self) -> None:
        """Leave the queue and wake everybody who waits. May be called twice, and while another thread waits.

        After the writer's, readers get what was written, then a PeerLostError.
        """
        self._process = 0
        self._finalizer()

    def _receiving(self, told: str) -> Receiver:
        if self._process != _process:
            self._refuse_use()
        if self._receiver is None:
            raise ConfigError(f"Only readers can {told}")
        return self._receiver

    def _sending(self, told: str) -> Sender:
        if self._process != _process:
            self._refuse_use()
        if self._sender is None:
            raise ConfigError(f"Only writers can {told}")
        return self._sender

    def _refuse_use(self) -> NoReturn:
        if not self._process:
            raise GroupClosedError("the queue is shut down")
        raise GroupClosedError("the queue belongs to the process that made it; make another after a fork")

    @contextlib.contextmanager
    def _telling(self, op: str) -> Iterator[None]:
        try:
            if self._process != _process:
                self._refuse_use()
            yield
        except CommError as error:
            self._sign(error, op)
            raise

    def _sign(self, error: CommError, op: str) -> None:
        error.group, error.op, error.rank = error.group or "queue", error.op or op, self._rank


def _take_back(receiver: Receiver) -> None:
    try:
        receiver.take_back()
    finally:
        # Where a signal ended the first call, or else the slot would stay lent.
        receiver.take_back()


def _close_all(sides: list[_Side], process: int) -> None:
    # A forked child has these objects, too, and its parent goes on using them.
    if process == _process:
        for side in sides:
            side.close()
