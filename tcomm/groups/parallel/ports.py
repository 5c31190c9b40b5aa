"""Ports that stay free until they are used."""

from __future__ import annotations

import contextlib
import errno
import socket
import weakref

from tcomm.config import EngineConfig
from tcomm.errors import ConfigError

__all__ = ["reserve_ports"]


def reserve_ports(host: str, count: int, owner: object) -> list[int]:
    """Free ports of an address of this host; none where it is not of this host.

    They are kept bound, and nobody listens on them, until `owner` is garbage: the kernel gives them to no one
    who asks for any port, and whoever binds one by its number with SO_REUSEADDR, in this process or another,
    gets it. So between here and there a port is lost only to a program that wants that very number.

    Args:
        host: name or address.
        count: how many.
        owner: what the ports are for; can be weakly referenced.

    Raises:
        ConfigError: when `TCOMM_PORT` says where to start and there are not enough above it.
        OSError: when there are no sockets or ports left.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError:
        return []
    ports: list[int] = []
    start = EngineConfig.from_environment().port
    candidates = iter(range(start, 65536)) if start else iter([0] * count)
    with contextlib.ExitStack() as kept:
        while len(ports) < count:
            number = next(candidates, None)
            if number is None:
                raise ConfigError(f"no {count} ports from TCOMM_PORT={start} on are free; give a lower one")
            held = kept.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                held.bind((address[0], number, *address[2:]))
            except OSError as error:
                held.close()
                if error.errno == errno.EADDRNOTAVAIL:
                    return []
                if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                    raise
            else:
                # Not before: two that reserve would get the same port.
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                ports.append(held.getsockname()[1])
        weakref.finalize(owner, kept.pop_all().close)
    return ports
