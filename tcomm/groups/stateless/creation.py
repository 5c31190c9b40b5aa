"""From an address to a group: who serves there, and under what keys the group speaks."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
import threading
import time

from torch._C._distributed_c10d import HashStore, Store

from tcomm.errors import ConfigError, DuplicateRankError, RendezvousError, TcommError
from tcomm.groups.differences import installed_version
from tcomm.groups.stateless.addresses import address_text
from tcomm.groups.stateless.rendezvous import is_open, meet
from tcomm.groups.stateless.sealed import SealedStore
from tcomm.groups.stateless.stores import MeetingPoint, join_at, serve_at
from tcomm.memory.liveness import Identity, my_identity
from tcomm.memory.pause import Pause
from tcomm.objects.layout import VERSION
from tcomm.objects.secret import require_secret

__all__ = ["OpenedGroup", "check_place", "check_seconds", "open_group"]

_PROBE_SECONDS = 2.0
_READING_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class OpenedGroup:
    """A group that came together."""

    sealed: SealedStore
    """Below `prefix`; `.store` is the raw one."""
    prefix: str
    """Of its keys, which no other group has."""
    identities: tuple[Identity, ...]
    """The process of each rank."""
    point: MeetingPoint | None
    """Keeps the store alive; None for a group of one."""


def open_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    name: str,
    timeout: float,
    listen_socket: socket.socket | None = None,
    via: Store | None = None,
) -> OpenedGroup:
    """Meet the other ranks of a group at an address. **Collective.**

    Args:
        host: where rank 0 listens.
        port: likewise; 0 where `listen_socket` or `via` is given.
        rank: this process.
        world_size: number of ranks.
        name: of the group; groups of several names can meet at one address at once.
        timeout: seconds.
        listen_socket: rank 0's, bound and listening; owned by the group from now on.
        via: a store that the ranks have already, by which rank 0 tells the others its port.

    Raises:
        ConfigError: when an argument makes no sense, or the address needs a secret.
        OSError: on rank 0, when the address is taken by a stranger.
        DuplicateRankError, GroupMismatchError, RendezvousError: as `meet` does.
    """
    check_place(rank, world_size)
    _check_address(host, port, rank, world_size, listen_socket is None and via is None)
    if listen_socket is not None and rank:
        raise ConfigError(f"rank {rank} gave a listen_socket; rank 0 alone listens")
    check_seconds("timeout", timeout)
    secret = require_secret(host)
    deadline = time.monotonic() + timeout
    if world_size == 1:
        if listen_socket is not None:
            listen_socket.close()
        return OpenedGroup(SealedStore(HashStore(), secret), "", (my_identity(),), None)
    notes = None if via is None else SealedStore(via, secret, f"address of {name}", seconds=timeout)
    if rank == 0:
        point = _serve(host, port, name, secret, listen_socket, timeout)
        if notes is not None:
            for peer in range(1, world_size):
                notes.set(_address_key(name, peer), str(point.port).encode())
    else:
        if port == 0 and notes is not None:
            port = _told_port(notes, name, rank, deadline, timeout)
        point = join_at(host, port, _left(deadline))
    hall = point.sealed(secret, _left(deadline))
    settings = {"tcomm": installed_version(), "messages": str(VERSION)}
    try:
        with _turn(point, name, rank, deadline):
            meeting = meet(hall, name, rank, world_size, _left(deadline), settings)
    except TcommError:
        _keep_open(point)
        raise
    prefix = f"tcomm/{name}/{meeting.generation}"
    return OpenedGroup(hall.below(prefix), prefix, meeting.identities, point)


def check_place(rank: int, world_size: int) -> None:
    """Check that there is such a rank.

    Raises:
        ConfigError: when there is not.
    """
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank {rank!r} of {world_size!r} ranks: it must be at least 0 and below their number"
        )


def check_seconds(what: str, seconds: float) -> float:
    """`seconds`, when they are a positive number.

    Raises:
        ConfigError: when they are not.
    """
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not seconds > 0:
        raise ConfigError(f"{what} is {seconds!r}, which is not a positive number of seconds")
    return seconds


def _check_address(host: str, port: int, rank: int, world_size: int, is_known_by_port: bool) -> None:
    if not isinstance(host, str) or not host or type(port) is not int or not 0 <= port < 1 << 16:
        raise ConfigError(
            f"rank {rank} cannot meet the others at host {host!r}, port {port!r}; give an address and a port "
            "up to 65535"
        )
    if port == 0 and world_size > 1 and is_known_by_port:
        raise ConfigError(
            "port 0 is a free port that the other ranks cannot know; give a port, or a store that all ranks "
            "have (via=), by which rank 0 tells it"
        )


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)


def _serve(
    host: str,
    port: int,
    name: str,
    secret: bytes | None,
    listen_socket: socket.socket | None,
    timeout: float,
) -> MeetingPoint:
    try:
        return serve_at(host, port, listen_socket, timeout)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        taken = False
        with contextlib.suppress(TcommError):
            taken = is_open(join_at(host, port, _PROBE_SECONDS).sealed(secret, _PROBE_SECONDS), name)
        if not taken:
            raise
        raise DuplicateRankError(
            f"another process also claims rank 0 of group {name!r} at {address_text(host, port)}; give each "
            "process its own rank, or another group its own port"
        ) from error


def _keep_open(point: MeetingPoint) -> None:
    """Let the others read why the group failed, before the last hold on the store is gone."""
    timer = threading.Timer(_READING_SECONDS, lambda _: None, (point,))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _turn(point: MeetingPoint, name: str, rank: int, deadline: float):  # type: ignore[no-untyped-def]
    """Groups of one name that one process opens come together one after another."""
    if rank:
        yield
        return
    lock = point.turn(name)
    if not lock.acquire(timeout=_left(deadline)):
        raise RendezvousError(
            f"another group {name!r} of this process still waits for its ranks at "
            f"{address_text(point.host, point.port)}; give groups that meet at once names of their own"
        )
    try:
        yield
    finally:
        lock.release()


def _address_key(name: str, rank: int) -> str:
    return f"tcomm/{name}/port/{rank}"


def _told_port(notes: SealedStore, name: str, rank: int, deadline: float, timeout: float) -> int:
    """The port that rank 0 was given, told once to each rank."""
    key, pause = _address_key(name, rank), Pause()
    while not notes.check([key]):
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"rank 0 of group {name!r} told no port by the store given (via=) within {timeout:g} s; "
                "check that it runs and makes the same groups"
            )
        pause()
    told = notes.get(key)
    notes.delete_key(key)
    if not told.isdigit():
        raise RendezvousError(
            f"what the store given (via=) has as the port of group {name!r} is none: {told!r}"
        )
    return int(told)
