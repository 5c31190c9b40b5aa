"""How two processes of a job find each other by TCP, and strangers are turned away."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import hmac
import ipaddress
import logging
import secrets
import select
import socket
import time
from collections.abc import Generator
from typing import NamedTuple

from tcomm.errors import ConfigError, PeerTimeoutError, RendezvousError
from tcomm.objects.frames import FrameConnection, FrameKey, wait_until_ready
from tcomm.objects.handlers import is_from_handler
from tcomm.objects.secret import require_secret

__all__ = ["FrameListener", "connect_frames"]

logger = logging.getLogger("tcomm")

_HELLO = b"tcommF1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_WELCOME, _REFUSAL = b"\x01", b"\x00"
_HANDSHAKE_SECONDS = 2.0
_MAX_GUESTS = 64
_RETRY_SECONDS = 0.05
_NO_SECRET = b"tcomm on loopback"
_Handshake = Generator[None, None, FrameConnection]
_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Guest(NamedTuple):
    """A connection whose handshake is under way."""

    sock: socket.socket
    handshake: _Handshake
    deadline: float


class FrameListener:
    """Listens at one address for processes of this job.

    Whoever does not show in two seconds that it has the job's secret is dropped and counted. Handshakes go on
    side by side, so that nobody who is slow keeps others waiting.

    Args:
        host: address of this machine, or a name of it; not one that stands for all.
        port: 0: any that is free.

    Attributes:
        refused: connections that were dropped.

    Raises:
        ConfigError: when `host` is reached from other machines and the job has no secret, or nothing can
            listen there.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        self._key = _master_key(require_secret(host))
        self._sock = _listen(host, port)
        self._guests: list[_Guest] = []
        self._ready: collections.deque[FrameConnection] = collections.deque()
        self.refused = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which it listens."""
        host, port, *_ = self._sock.getsockname()
        return host, port

    def accept(self, deadline: float) -> FrameConnection:
        """The next process that connects and has the secret.

        Args:
            deadline: on the monotonic clock; one in the past asks for who has come.

        Raises:
            PeerTimeoutError: when there is none before the deadline.
        """
        while not self._ready:
            left = deadline - time.monotonic()
            self._step(max(0.0, left))
            if left <= 0 and not self._ready:
                raise PeerTimeoutError(
                    f"no process of this job connected to {_told(self.address)} before the deadline; "
                    f"{self.refused} connections were refused since it listens there"
                )
        return self._ready.popleft()

    def close(self) -> None:
        """Stop listening, and drop who was not accepted."""
        self._sock.close()
        for guest in self._guests:
            guest.sock.close()
        for connection in self._ready:
            connection.close()
        self._guests.clear()
        self._ready.clear()

    def __enter__(self) -> FrameListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self, seconds: float) -> None:
        """Wait for a while, and serve whoever has something for us."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        for guest in self._guests:
            poll.register(guest.sock, select.POLLIN)
        due = min((guest.deadline - time.monotonic() for guest in self._guests), default=seconds)
        ready = {fd for fd, _ in poll.poll(max(0.0, min(seconds, due)) * 1000)}
        for guest in list(self._guests):
            if guest.sock.fileno() in ready:
                self._go_on(guest)
            elif time.monotonic() >= guest.deadline:
                self._refuse(guest, "it did not finish the handshake in time")
        if self._sock.fileno() in ready:
            self._let_in()

    def _let_in(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if is_from_handler(error):
                raise
            if error.errno not in _NO_MORE:
                return
            if self._guests:
                self._refuse(self._guests[0], "there are no descriptors left")
            else:
                time.sleep(_RETRY_SECONDS)
            return
        sock.setblocking(False)
        if len(self._guests) >= _MAX_GUESTS:
            self._refuse(self._guests[0], f"{_MAX_GUESTS} others are in the handshake")
        guest = _Guest(sock, _receive_guest(sock, self._key), time.monotonic() + _HANDSHAKE_SECONDS)
        self._guests.append(guest)
        self._go_on(guest)

    def _go_on(self, guest: _Guest) -> None:
        try:
            next(guest.handshake)
        except StopIteration as done:
            self._guests.remove(guest)
            self._ready.append(done.value)
        except BaseException as error:
            # Whatever ended its handshake, there is nothing to go on with.
            self._refuse(guest, str(error))
            if not isinstance(error, (RendezvousError, OSError)) or is_from_handler(error):
                raise

    def _refuse(self, guest: _Guest, reason: str) -> None:
        self._guests.remove(guest)
        guest.sock.close()
        self.refused += 1
        # Who knocks without end does not fill the log: the 1st, 2nd, 4th, 8th ... are told.
        if self.refused & (self.refused - 1) == 0:
            logger.warning("refused connection %d to %s: %s", self.refused, _told(self.address), reason)


def connect_frames(host: str, port: int, deadline: float) -> FrameConnection:
    """Connect to a `FrameListener`, which may begin to listen later.

    Args:
        host: its address or name.
        port: its port.
        deadline: on the monotonic clock.

    Raises:
        ConfigError: when `host` is another machine and the job has no secret.
        RendezvousError: when nobody listens there before the deadline, or it has another secret.
    """
    key = _master_key(require_secret(host))
    while True:
        try:
            return _connect(host, port, key, deadline)
        except (OSError, PeerTimeoutError) as error:
            if is_from_handler(error):
                raise
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise RendezvousError(
                    f"no listener of this job answered at {_told((host, port))} before the deadline: {error}"
                ) from error
        time.sleep(_RETRY_SECONDS)


def _connect(host: str, port: int, key: bytes, deadline: float) -> FrameConnection:
    with contextlib.ExitStack() as on_failure:
        left = max(0.001, deadline - time.monotonic())
        sock = on_failure.enter_context(socket.create_connection((host, port), timeout=left))
        sock.setblocking(False)
        handshake = _introduce(sock, key)
        while True:
            try:
                next(handshake)
            except StopIteration as done:
                on_failure.pop_all()
                connection: FrameConnection = done.value
                return connection
            wait_until_ready(sock, select.POLLIN, deadline)


def _introduce(sock: socket.socket, key: bytes) -> _Handshake:
    """The handshake of who connects; yields where it waits for bytes."""
    mine = secrets.token_bytes(_NONCE_BYTES)
    _give(sock, _HELLO + mine)
    nonces = mine + (yield from _take(sock, _NONCE_BYTES))
    _give(sock, _derive(key, b"who connects", nonces))
    verdict = yield from _take(sock, len(_WELCOME) + _PROOF_BYTES)
    proof = _derive(key, b"who listens", nonces)
    if not hmac.compare_digest(verdict, _WELCOME + proof):
        raise RendezvousError(
            f"{_told(sock.getpeername())} has another secret than this process; "
            "set TCOMM_SECRET to the same value in every process of the job"
        )
    return FrameConnection(sock, *_frame_keys(key, nonces))


def _receive_guest(sock: socket.socket, key: bytes) -> _Handshake:
    """The handshake of who listens. It shows nothing made with the secret before the guest has."""
    hello = yield from _take(sock, len(_HELLO) + _NONCE_BYTES)
    if not hello.startswith(_HELLO):
        raise RendezvousError("it speaks another protocol")
    mine = secrets.token_bytes(_NONCE_BYTES)
    nonces = hello[len(_HELLO) :] + mine
    _give(sock, mine)
    proof = yield from _take(sock, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _derive(key, b"who connects", nonces)):
        _give(sock, _REFUSAL + bytes(_PROOF_BYTES))
        raise RendezvousError("it has another secret; set TCOMM_SECRET to the same value in every process")
    _give(sock, _WELCOME + _derive(key, b"who listens", nonces))
    return FrameConnection(sock, *reversed(_frame_keys(key, nonces)))


def _take(sock: socket.socket, nbytes: int) -> Generator[None, None, bytes]:
    """Exactly so many bytes: what follows is not ours."""
    taken = b""
    while len(taken) < nbytes:
        try:
            more = sock.recv(nbytes - len(taken))
        except BlockingIOError:
            yield
            continue
        if not more:
            raise ConnectionResetError("the connection was closed in the handshake")
        taken += more
    return taken


def _give(sock: socket.socket, message: bytes) -> None:
    """A few bytes, for which a fresh connection always has room."""
    if sock.send(message) != len(message):
        raise ConnectionResetError("the connection took too little in the handshake")


def _master_key(secret: bytes | None) -> bytes:
    return hashlib.blake2b(secret or _NO_SECRET, digest_size=32, person=b"tcomm secret").digest()


def _derive(key: bytes, purpose: bytes, nonces: bytes) -> bytes:
    return hashlib.blake2b(nonces, digest_size=32, key=key, person=purpose).digest()


def _frame_keys(key: bytes, nonces: bytes) -> tuple[FrameKey, FrameKey]:
    """Of the direction from who connects, and of that from who listens."""
    there, back = _derive(key, b"from connecting", nonces), _derive(key, b"from listening", nonces)
    return FrameKey(there), FrameKey(back)


def _told(address: tuple[object, ...]) -> str:
    return f"{address[0]}:{address[1]}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified:
            raise ConfigError(f"host {host!r} stands for all interfaces; give the address of one")
        with contextlib.ExitStack() as on_failure:
            sock = on_failure.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(128)
            sock.setblocking(False)
            on_failure.pop_all()
            return sock
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {_told((host, port))}: {error}; "
            "give an address of this machine and a free port"
        ) from error
