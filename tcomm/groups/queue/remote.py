"""Readers on other nodes: a connection each, and a count of chunks in return. See `docs/queue.md`."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import socket
import struct
import time
from typing import Any

from tcomm.errors import (
    CommError,
    ConfigError,
    DecodeError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.groups.queue.patience import Patience
from tcomm.objects.codec import decode, encode
from tcomm.objects.frames import FrameConnection
from tcomm.objects.listener import FrameListener, connect_frames

__all__ = ["REMOTE_CHUNK_BYTES", "RemoteReader", "RemoteReaders", "parse_url"]

logger = logging.getLogger("tcomm")

REMOTE_CHUNK_BYTES = 32 * 1024
_WINDOW_BYTES = 2 * REMOTE_CHUNK_BYTES
"""What the kernel holds for a reader that does not listen."""
_HEAD = struct.Struct("<qq")
_COUNT = struct.Struct("<q")
_READY_TOTAL = -1
_MAX_HELLO_BYTES = 1024
_FRAME_SECONDS = 10.0
"""For the rest of a frame that has begun to pass."""


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of `RemoteReaders.url`.

    Raises:
        ConfigError: when it is none.
    """
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{url!r} is no address of a queue, such as tcp://127.0.0.1:29500")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Peer:
    """One remote reader, as the writer sees it."""

    def __init__(self, connection: FrameConnection, rank: int, told: str) -> None:
        self.connection = connection
        self.rank = rank
        self.told = told
        self.under_way: collections.deque[int] = collections.deque()
        self.taken = 0
        self.progress = time.monotonic()


class RemoteReaders:
    """The writer's side of all its remote readers.

    Args:
        host: address of this host to listen on.
        count: readers that come.
        max_chunks: chunks that may be under way to each.
        drop_dead: go on without readers that are gone.
    """

    def __init__(self, host: str, count: int, max_chunks: int, drop_dead: bool) -> None:
        self._listener = FrameListener(host)
        self._count = count
        self._max_chunks = max_chunks
        self._drop_dead = drop_dead
        self._peers: list[_Peer] = []
        self._is_open = self._closed = False

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._listener.address

    @property
    def url(self) -> tuple[str, bool]:
        """The same for a `Handle`: `tcp://host:port`, and whether the host is an IPv6 address in brackets."""
        host, port = self.address
        is_ipv6 = ":" in host
        return f"tcp://[{host}]:{port}" if is_ipv6 else f"tcp://{host}:{port}", is_ipv6

    def wait_until_open(self, patience: Patience) -> None:
        """Wait until all readers are connected, then stop listening.

        Raises:
            PeerTimeoutError: when some did not come.
        """
        came = 0
        while came < self._count:
            self.refuse_closed()
            seconds = patience.slice()
            if seconds <= 0:
                host, port = self.address
                raise PeerTimeoutError(
                    f"{self._count - came} of {self._count} remote readers did not connect to {host}:{port} "
                    f"within {patience.seconds:g} s; if they cannot reach that address, give connect_ip or "
                    "TCOMM_HOST_IP"
                )
            with contextlib.suppress(PeerTimeoutError, DecodeError, PeerLostError):
                connection = self._listener.accept(time.monotonic() + seconds)
                self._peers.append(_introduced(connection))
                came += 1
        self._is_open = True
        self._listener.close()

    def publish_ready(self) -> None:
        """Let the readers' `wait_until_ready` return."""
        self._send([_HEAD.pack(_READY_TOTAL, 0)])

    def has_room(self) -> bool:
        """Whether every reader can be sent a chunk.

        Raises:
            PeerLostError: when one is gone. CommError: when they were not waited for.
        """
        self.refuse_closed()
        if not self._is_open:
            raise CommError("call wait_until_ready before the first message")
        for peer in list(self._peers):
            self._hear(peer)
        return not any(self._is_full(peer) for peer in self._peers)

    def wait_for_room(self, patience: Patience) -> bool:
        """Wait for that; False when the deadline passed first. Raises PeerLostError when one is gone."""
        while not self.has_room():
            seconds = patience.slice()
            if seconds <= 0:
                return False
            poll = select.poll()
            for peer in self._peers:
                poll.register(peer.connection, select.POLLIN)
            poll.poll(seconds * 1000)
        return True

    def publish(self, parts: list[memoryview], total: int, offset: int) -> None:
        """Send a chunk to every reader; there is room."""
        nbytes = sum(map(len, parts))
        for peer in self._peers:
            peer.under_way.append(nbytes)
        self._send([_HEAD.pack(total, offset), *parts])

    def describe_lag(self) -> tuple[str, tuple[int, ...]]:
        """Who has no room, and what is known of it."""
        peer = max(self._peers, key=lambda peer: (self._is_full(peer), len(peer.under_way)))
        told = (
            f"the remote reader of rank {peer.rank} ({peer.told}, connected) took its last chunk "
            f"{time.monotonic() - peer.progress:.1f} s ago; it is {len(peer.under_way)} chunks behind"
        )
        return told, (peer.rank,)

    def refuse_closed(self) -> None:
        """Raise GroupClosedError when this side has shut down."""
        if self._closed:
            raise GroupClosedError("the queue is shut down")

    def close(self) -> None:
        """Close all connections. May be called twice."""
        self._closed = True
        self._listener.close()
        for peer in self._peers:
            peer.connection.close()

    def _is_full(self, peer: _Peer) -> bool:
        sent = sum(peer.under_way)
        return len(peer.under_way) >= self._max_chunks or sent > _WINDOW_BYTES - REMOTE_CHUNK_BYTES

    def _hear(self, peer: _Peer) -> None:
        """Take the counts that have come."""
        poll = select.poll()
        poll.register(peer.connection, select.POLLIN)
        try:
            while poll.poll(0):
                answer = peer.connection.receive(_COUNT.size, time.monotonic() + _FRAME_SECONDS)
                count = _COUNT.unpack(answer)[0] if len(answer) == _COUNT.size else -1
                if not peer.taken < count <= peer.taken + len(peer.under_way):
                    raise DecodeError(f"it says that it took {count} chunks")
                for _ in range(count - peer.taken):
                    peer.under_way.popleft()
                peer.taken, peer.progress = count, time.monotonic()
        except (PeerLostError, PeerTimeoutError, DecodeError) as error:
            self._lose(peer, error)

    def _send(self, parts: list[bytes | memoryview]) -> None:
        for peer in list(self._peers):
            try:
                peer.connection.send(parts, time.monotonic() + _FRAME_SECONDS)
            except (PeerLostError, PeerTimeoutError) as error:
                self._lose(peer, error)

    def _lose(self, peer: _Peer, error: CommError) -> None:
        if not self._drop_dead:
            raise PeerLostError(
                f"the remote reader of rank {peer.rank} ({peer.told}) is lost: {error}; "
                "drop_dead_readers=True goes on without",
                peers=(peer.rank,),
            ) from error
        logger.warning("the queue goes on without the remote reader of rank %d: %s", peer.rank, error)
        self._peers.remove(peer)
        peer.connection.close()


def _introduced(connection: FrameConnection) -> _Peer:
    try:
        hello: Any = decode(connection.receive(_MAX_HELLO_BYTES, time.monotonic() + _FRAME_SECONDS))
        rank, pid, host = hello if isinstance(hello, list) and len(hello) == 3 else (None, None, None)
        if not (isinstance(rank, int) and isinstance(pid, int) and isinstance(host, str)):
            raise DecodeError("a remote reader introduced itself by something else")
    except CommError:
        connection.close()
        raise
    return _Peer(connection, rank, f"pid {pid} on {host[:100]}")


class RemoteReader:
    """A remote reader's side.

    Args:
        host: where the writer listens.
        port: likewise.
        rank: of this reader.

    Attributes:
        taken: chunks that were released.
    """

    def __init__(self, host: str, port: int, rank: int) -> None:
        self._address = (host, port)
        self.rank = rank
        self._connection: FrameConnection | None = None
        self._poll = select.poll()
        self._frame: bytearray | None = None
        self.taken = 0
        self._closed = False

    def wait_until_ready(self, patience: Patience) -> None:
        """Connect, and wait for the writer to have all its readers.

        Raises:
            RendezvousError: when nobody listens there. PeerTimeoutError, PeerLostError: as `wait`.
        """
        deadline = patience.deadline
        host, port = self._address
        connection = connect_frames(host, port, float("inf") if deadline is None else deadline)
        connection.send(
            encode([self.rank, os.getpid(), socket.gethostname()]).parts, time.monotonic() + _FRAME_SECONDS
        )
        self._connection = connection
        self._poll.register(connection, select.POLLIN)
        self.wait(patience)
        frame = connection.receive(REMOTE_CHUNK_BYTES + _HEAD.size, time.monotonic() + _FRAME_SECONDS)
        if frame != _HEAD.pack(_READY_TOTAL, 0):
            raise DecodeError("the writer began with something else than that it is ready")

    def has_chunk(self) -> bool:
        """Whether the next chunk has come, or begun to, or the connection has ended."""
        if self._connection is None:
            raise CommError("call wait_until_ready before the first message")
        if self._closed:
            raise GroupClosedError("the queue is shut down")
        return self._frame is not None or bool(self._poll.poll(0))

    def wait(self, patience: Patience) -> None:
        """Wait for that.

        Raises:
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when none comes.
        """
        while not self.has_chunk():
            patience.refuse_cancelled()
            seconds = patience.slice()
            if seconds <= 0:
                raise PeerTimeoutError(
                    f"the writer ({self._told()}, connected) wrote nothing within {patience.seconds:g} s"
                )
            self._poll.poll(seconds * 1000)

    def look(self) -> tuple[int, int, memoryview]:
        """The next chunk: bytes of its message, its offset, and its bytes.

        Raises:
            PeerLostError: when the writer is gone. DecodeError: when it is no chunk.
        """
        if self._frame is None:
            assert self._connection is not None
            limit = REMOTE_CHUNK_BYTES + _HEAD.size
            try:
                self._frame = self._connection.receive(limit, time.monotonic() + _FRAME_SECONDS)
            except (PeerLostError, PeerTimeoutError, DecodeError) as error:
                raise PeerLostError(f"the writer ({self._told()}) is lost: {error}") from error
        if len(self._frame) < _HEAD.size:
            raise DecodeError(f"a chunk came in {len(self._frame)} bytes")
        total, offset = _HEAD.unpack_from(self._frame)
        return total, offset, memoryview(self._frame)[_HEAD.size :]

    def release(self) -> None:
        """Forget the chunk, and tell the writer."""
        self._frame = None
        self.taken += 1
        # Where the writer is gone, the next look says so.
        with contextlib.suppress(PeerLostError, PeerTimeoutError):
            assert self._connection is not None
            self._connection.send([_COUNT.pack(self.taken)], time.monotonic() + _FRAME_SECONDS)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._closed = True
        if self._connection is not None:
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._poll.unregister(self._connection)
            self._connection.close()

    def _told(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"
