"""One store per address in a process, however many groups meet there."""

from __future__ import annotations

import datetime
import functools
import os
import socket
import threading
import weakref
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tcomm.errors import CommError, RendezvousError
from tcomm.groups.stateless.addresses import address_text, bind_listen_socket, wait_until_listening
from tcomm.groups.stateless.sealed import CallThread, SealedStore
from tcomm.objects.secret import require_secret

__all__ = ["MeetingPoint", "create_tcp_store", "get_cached_tcp_store_client", "join_at", "serve_at"]


def create_tcp_store(
    host: str, port: int, listen_socket: socket.socket | None = None, **kwargs: Any
) -> TCPStore:
    """A `TCPStore`; one that serves listens on `host` and nowhere else.

    Its values are not signed, and whoever reaches the address can read and write them.

    Args:
        host: to listen on or to connect to. To listen on anything but loopback needs TCOMM_SECRET.
        port: 0 for a free one where it serves, which `.port` tells.
        listen_socket: bound and listening; this store serves from it and owns it from now on. Closed when
            there is no store in the end.
        kwargs: of `torch.distributed.TCPStore`; `is_master=True` serves.

    Raises:
        ConfigError: when the address may not be listened on.
        OSError: when it is taken. RendezvousError: when nobody answers there.
    """
    serves = bool(kwargs.pop("is_master", False)) or listen_socket is not None
    kwargs.setdefault("wait_for_workers", False)
    timeout = kwargs.setdefault("timeout", datetime.timedelta(seconds=300))
    if not serves:
        wait_until_listening(host, port, timeout.total_seconds())
        return _connect(host, port, is_master=False, **kwargs)
    try:
        require_secret(host)
        if listen_socket is None:
            listen_socket = bind_listen_socket(host, port)
        port = int(listen_socket.getsockname()[1])
        store = _connect(host, port, is_master=True, master_listen_fd=listen_socket.fileno(), **kwargs)
    except BaseException:
        if listen_socket is not None:
            listen_socket.close()
        raise
    listen_socket.detach()
    return store


def _connect(host: str, port: int, **kwargs: Any) -> TCPStore:
    seconds = kwargs["timeout"].total_seconds()
    try:
        # In a thread: torch waits for ever on somebody who accepts and says nothing.
        return CallThread().call(seconds, lambda: TCPStore(host, port, **kwargs))
    except TimeoutError as error:
        raise RendezvousError(
            f"who accepts connections at {address_text(host, port)} is no store, or a stopped one: it said "
            f"nothing within {seconds:g} s"
        ) from error
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        raise RendezvousError(f"no store at {address_text(host, port)}: {reason}") from error


def get_cached_tcp_store_client(host: str, port: int) -> TCPStore:
    """A client of the store at an address; the last one is kept and given again.

    Raises:
        RendezvousError: when nobody answers there.
    """
    return _cached_client(host, port, os.getpid())


@functools.lru_cache(maxsize=1)
def _cached_client(host: str, port: int, pid: int) -> TCPStore:
    del pid  # a child of a fork gets a client of its own
    return create_tcp_store(host, port)


class MeetingPoint:
    """The store at one address, as this process has it. It ends with the last group that uses it.

    Attributes:
        host: as given.
        port: as bound.
        store: raw.
        serves: whether the store is in this process.
    """

    def __init__(self, host: str, port: int, store: TCPStore, serves: bool) -> None:
        self.host = host
        self.port = port
        self.store = store
        self.serves = serves
        self._thread = None if serves else CallThread()
        self._locks: dict[str, threading.Lock] = {}

    def sealed(self, secret: bytes | None, seconds: float) -> SealedStore:
        """The store with signed values, each call ended after `seconds`."""
        where = f"the store at {address_text(self.host, self.port)}"
        return SealedStore(self.store, secret, "", where, self._thread, seconds)

    def answers(self) -> bool:
        """Whether the store is still there."""
        try:
            self.sealed(None, _ANSWER_SECONDS).check(["tcomm"])
        except CommError:
            return False
        return True

    def turn(self, name: str) -> threading.Lock:
        """The lock of those groups of one name that this process opens here."""
        with _lock:
            return self._locks.setdefault(name, threading.Lock())


_lock = threading.Lock()
_points: weakref.WeakValueDictionary[tuple[int, str, int, bool], MeetingPoint] = weakref.WeakValueDictionary()
_ANSWER_SECONDS = 5.0


def serve_at(host: str, port: int, listen_socket: socket.socket | None, timeout: float) -> MeetingPoint:
    """The meeting point at an address, served by this process; the one it serves there already, if any.

    Args:
        host: to listen on.
        port: 0 for a free one.
        listen_socket: to serve from, whose port counts; owned by the store from now on.
        timeout: seconds that a raw wait on the store may take.

    Raises:
        ConfigError: when the address may not be listened on. OSError: when it is taken.
    """
    with _lock:
        point = _points.get((os.getpid(), host, port, True)) if listen_socket is None else None
        if point is None:
            limit = datetime.timedelta(seconds=timeout)
            store = create_tcp_store(host, port, listen_socket, is_master=True, timeout=limit)
            point = MeetingPoint(host, store.port, store, True)
            _points[os.getpid(), host, store.port, True] = point
    return point


def join_at(host: str, port: int, timeout: float) -> MeetingPoint:
    """The meeting point at an address that another process serves; the same for all groups there.

    Raises:
        ConfigError: when the host has no address.
        RendezvousError: when nobody answers there within `timeout` seconds.
    """
    # Also where we have a client, which may be of a server that has ended.
    wait_until_listening(host, port, timeout)
    key = (os.getpid(), host, port, False)
    point = _points.get(key)
    if point is None or not point.answers():
        store = create_tcp_store(host, port, timeout=datetime.timedelta(seconds=timeout))
        made = MeetingPoint(host, port, store, False)
        with _lock:
            if _points.get(key) is point:
                _points[key] = made
            point = _points[key]
    return point
