"""The writer's side of a queue: to the ring of this node, to other nodes, or to both."""

from __future__ import annotations

from tcomm.config import resolve_timeout
from tcomm.errors import QueueFullError, UsageError
from tcomm.groups.queue.chunks import cut
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.remote import RemoteReaders
from tcomm.groups.queue.ring import PIECE_BYTES
from tcomm.groups.queue.ring_writer import RingWriter
from tcomm.objects.codec import Encoded

__all__ = ["Sender"]


class Sender:
    """Messages as chunks, each given out to all readers or to none.

    Args:
        local: the readers of this node; None: there are none.
        remote: all others; None: there are none.
        chunk_bytes: bytes of a chunk at most.
        seconds: to wait where a call says nothing; None: as long as the readers live.

    Attributes:
        sides: those of the two that there are.
        is_lent: whether the caller is writing what `slot` returned.
    """

    def __init__(
        self, local: RingWriter | None, remote: RemoteReaders | None, chunk_bytes: int, seconds: float | None
    ) -> None:
        self._local = local
        self._remote = remote
        self._chunk_bytes = chunk_bytes
        self._short = min(chunk_bytes, PIECE_BYTES) if remote is None and local is not None else -1
        self._seconds = seconds
        self.is_lent = False
        self.sides: list[RingWriter | RemoteReaders] = [s for s in (local, remote) if s is not None]

    def wait_until_ready(self, patience: Patience) -> None:
        """Wait for all readers, then tell them. Raises as the sides do."""
        for side in self.sides:
            side.wait_until_open(patience)
        for side in self.sides:
            side.publish_ready()

    def send_flat(self, message: bytes, timeout: float | str | None) -> None:
        """As `send`, of a message without views; the way of most messages."""
        if timeout is not None or self.is_lent:
            self._check(timeout)
        local = self._local
        if local is None or len(message) > self._short or not local.put(message):
            self.send(Encoded([message], len(message)), timeout)

    def send(self, message: Encoded, timeout: float | str | None) -> None:
        """Give a message out.

        Raises:
            QueueFullError: when a reader has no room in time. PeerLostError: when one is gone.
            ConfigError: when the timeout makes no sense, or a slot is lent.
        """
        if timeout is not None or self.is_lent:
            self._check(timeout)
        local, nbytes = self._local, message.nbytes
        has_room = local is not None and local.has_room_now()
        if local is None or self._remote is not None or nbytes > self._chunk_bytes:
            self._send_in_chunks(message, Patience(timeout, self._seconds))
            return
        if not has_room:
            self._make_room(Patience(timeout, self._seconds))
        if nbytes > self._short:
            local.stream(message.parts, nbytes)
        else:
            message.write_into(local.slot())
            local.publish(nbytes, nbytes, 0)

    def slot(self, timeout: float | str | None) -> memoryview:
        """Memory for a whole chunk, once there is room; then to be lent. Raises as `send`."""
        self._check(timeout)
        if self._local is not None:
            # Also where there is room: a reader that is gone is missed before its slots are full.
            self._local.has_room_now()
        self._make_room(Patience(timeout, self._seconds))
        return self._local.slot() if self._local is not None else memoryview(bytearray(self._chunk_bytes))

    def publish_slot(self, slot: memoryview) -> None:
        """Give out what `slot` returned."""
        if self._remote is not None:
            self._remote.publish([slot], len(slot), 0)
        if self._local is not None:
            self._local.publish(len(slot), len(slot), 0)

    def _check(self, timeout: float | str | None) -> None:
        """Refuse what makes no sense also where nothing has to be waited for."""
        if timeout is not None:
            resolve_timeout(timeout)
        if self.is_lent:
            raise UsageError("a slot of this queue is being written; end the block of acquire_write first")

    def _make_room(self, patience: Patience) -> None:
        for side in self.sides:
            if not side.has_room() and not side.wait_for_room(patience):
                told, ranks = side.describe_lag()
                raise QueueFullError(
                    f"the queue is full and stayed so for {patience.seconds:g} s: {told}. Nothing was lost; "
                    "the object was not sent. Give a longer timeout or more chunks",
                    peers=ranks,
                )

    def _send_in_chunks(self, message: Encoded, patience: Patience) -> None:
        offset = 0
        for pieces in cut(message.parts, self._chunk_bytes):
            self._make_room(patience)
            nbytes = 0
            if self._remote is not None:
                self._remote.publish(pieces, message.nbytes, offset)
            for piece in pieces:
                if self._local is not None:
                    self._local.slot()[nbytes : nbytes + len(piece)] = piece
                nbytes += len(piece)
            if self._local is not None:
                self._local.publish(nbytes, message.nbytes, offset)
            offset += nbytes
