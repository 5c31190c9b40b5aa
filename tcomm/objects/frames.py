"""Authenticated frames over a TCP connection: who lacks the job's secret can neither send nor alter one.

`docs/objects.md` has the format. Every wait has a deadline, on the monotonic clock.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import select
import socket
import struct
import time
from collections.abc import Sequence

from tcomm.errors import DecodeError, PeerLostError, PeerTimeoutError
from tcomm.objects.handlers import is_from_handler

__all__ = ["FrameConnection", "FrameKey", "recv_frame", "send_frame", "wait_until_ready"]

_TAG_BYTES = 32
_LENGTH = struct.Struct("<Q")
_MAX_PARTS = 64
"""Parts of one system call."""


class FrameKey:
    """One direction of one connection, on one of its sides: the key, and the number of frames so far.

    A frame's tag covers its number, so that one that is sent again, left out or out of order is refused.

    Args:
        key: 32 bytes that both sides have and nobody else.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0
        self._is_inside = False

    def tag(self, length: bytes | bytearray, parts: Sequence[bytes | bytearray | memoryview]) -> bytes:
        """32 bytes that only who has the key can tell for the next frame."""
        digest = hashlib.blake2b(length, digest_size=_TAG_BYTES, key=self._key, person=b"tcomm frame")
        digest.update(_LENGTH.pack(self._count))
        for part in parts:
            digest.update(part)
        return digest.digest()

    def begin(self) -> None:
        """Say that a frame is about to pass.

        Raises:
            PeerLostError: when the one before broke off: nobody knows where the next begins.
        """
        if self._is_inside:
            raise PeerLostError("an earlier frame of this connection broke off; open another connection")

    def moved(self) -> None:
        """Say that a part of a frame has passed."""
        self._is_inside = True

    def end(self) -> None:
        """Say that a whole frame has passed."""
        self._is_inside = False
        self._count += 1


def send_frame(
    sock: socket.socket,
    parts: Sequence[bytes | bytearray | memoryview],
    key: FrameKey,
    deadline: float | None,
) -> None:
    """Send a frame, from where its parts lie.

    Args:
        sock: non-blocking.
        parts: together the frame; of unsigned bytes.
        key: of this direction.
        deadline: on the monotonic clock; None: as long as the peer lives.

    Raises:
        PeerLostError: when the connection is gone.
        PeerTimeoutError: when the peer does not take it in time; a frame of which nothing went out may
            be sent again.
    """
    key.begin()
    length = _LENGTH.pack(sum(len(part) for part in parts))
    rest = [memoryview(part) for part in (length + key.tag(length, parts), *parts) if len(part)]
    while rest:
        try:
            sent = sock.sendmsg(rest[:_MAX_PARTS])
        except BlockingIOError:
            wait_until_ready(sock, select.POLLOUT, deadline)
            continue
        except OSError as error:
            if is_from_handler(error):
                raise
            raise _lost(error) from error
        key.moved()
        while rest and sent >= len(rest[0]):
            sent -= len(rest.pop(0))
        if sent:
            rest[0] = rest[0][sent:]
    key.end()


def recv_frame(sock: socket.socket, key: FrameKey, max_nbytes: int, deadline: float | None) -> bytearray:
    """Receive a frame.

    Args:
        sock: non-blocking.
        key: of this direction.
        max_nbytes: that it may have; a larger one is refused before there is memory for it.
        deadline: on the monotonic clock; None: as long as the peer lives.

    Raises:
        PeerLostError: when the connection is gone.
        PeerTimeoutError: when it does not come in time; if nothing of it had come, it still can.
        DecodeError: when it is too large, or not what the peer sent next.
    """
    key.begin()
    head = bytearray(_LENGTH.size + _TAG_BYTES)
    _fill(sock, memoryview(head), key, deadline)
    length, tag = head[: _LENGTH.size], head[_LENGTH.size :]
    (nbytes,) = _LENGTH.unpack(length)
    if nbytes > max_nbytes:
        raise DecodeError(f"a frame of {nbytes} bytes is larger than max_nbytes={max_nbytes}")
    frame = bytearray(nbytes)
    _fill(sock, memoryview(frame), key, deadline)
    if not hmac.compare_digest(tag, key.tag(length, [frame])):
        raise DecodeError("a frame is not what the peer sent next: altered, sent again, or of somebody else")
    key.end()
    return frame


def _fill(sock: socket.socket, view: memoryview, key: FrameKey, deadline: float | None) -> None:
    while view:
        try:
            count = sock.recv_into(view)
        except BlockingIOError:
            wait_until_ready(sock, select.POLLIN, deadline)
            continue
        except OSError as error:
            if is_from_handler(error):
                raise
            raise _lost(error) from error
        if not count:
            raise PeerLostError("the peer closed the connection")
        key.moved()
        view = view[count:]


def _lost(error: OSError) -> PeerLostError:
    return PeerLostError(f"the connection to the peer is gone: {error}")


def wait_until_ready(sock: socket.socket, event: int, deadline: float | None) -> None:
    """Sleep until a socket is ready for `select.POLLIN` or `select.POLLOUT`, or has failed.

    Raises:
        PeerTimeoutError: when it is not before the deadline.
    """
    poll = select.poll()
    poll.register(sock, event)
    if not poll.poll(_milliseconds_until(deadline)):
        verb = "send" if event == select.POLLIN else "take"
        raise PeerTimeoutError(f"the peer did not {verb} the next bytes before the deadline")


def _milliseconds_until(deadline: float | None) -> int | None:
    return None if deadline is None else max(0, math.ceil((deadline - time.monotonic()) * 1000))


class FrameConnection:
    """A connection on which frames pass, both sides having shown that they have the secret.

    Args:
        sock: connected, non-blocking; this owns it.
        sending: key of what this side sends.
        receiving: key of what the other side sends.

    Attributes:
        peer: address of the other side, for messages.
    """

    def __init__(self, sock: socket.socket, sending: FrameKey, receiving: FrameKey) -> None:
        self._sock = sock
        self._sending = sending
        self._receiving = receiving
        host, port, *_ = sock.getpeername()
        self.peer = f"{host}:{port}"
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone says nothing: ask it after 10 s of silence, three times.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, parts: Sequence[bytes | bytearray | memoryview], deadline: float | None) -> None:
        """Send a frame; see `send_frame`.

        Raises:
            PeerLostError, PeerTimeoutError: when it does not go.
        """
        send_frame(self._sock, parts, self._sending, deadline)

    def receive(self, max_nbytes: int, deadline: float | None) -> bytearray:
        """Receive a frame; see `recv_frame`.

        Raises:
            PeerLostError, PeerTimeoutError, DecodeError: when none comes, or a wrong one.
        """
        return recv_frame(self._sock, self._receiving, max_nbytes, deadline)

    def fileno(self) -> int:
        """Descriptor to poll for frames."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; the other side gets a PeerLostError."""
        self._sock.close()

    def __enter__(self) -> FrameConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
