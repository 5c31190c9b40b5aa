"""Addresses: to listen on exactly one, to reach one, and to know which of ours faces another host."""

from __future__ import annotations

import errno
import socket
import time

from tcomm.errors import ConfigError, RendezvousError
from tcomm.objects.secret import require_secret

__all__ = ["address_text", "bind_listen_socket", "local_address_towards", "wait_until_listening"]

_BACKLOG = 4096
_CONNECT_SECONDS = 1.0
_PAUSE_SECONDS = 0.02


def address_text(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_listen_socket(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on the address given and nowhere else.

    Hand it over (`listen_socket=`) rather than its number: a port that is let go and bound again later may
    be somebody else's by then.

    Args:
        host: name or address, IPv4 or IPv6, of this host. Anything but loopback needs TCOMM_SECRET.
        port: 0 for a free one, which `getsockname()[1]` tells.

    Raises:
        ConfigError: when host or port makes no sense, or the host is not loopback and there is no secret.
        OSError: when the address is taken or not of this host; names it.
    """
    if not host or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ConfigError(f"cannot listen on host {host!r}, port {port!r}; give an address and 0 to 65535")
    require_secret(host)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} has no address: {error.strerror}") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        code = error.errno or errno.EADDRNOTAVAIL
        raise OSError(code, f"cannot listen on {address_text(host, port)}: {error.strerror}") from error
    return listening


def wait_until_listening(host: str, port: int, timeout: float) -> None:
    """Return when somebody accepts connections at an address.

    Raises:
        ConfigError: when the host has no address.
        RendezvousError: when nobody did within `timeout` seconds; says where and why.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
        except socket.gaierror as error:
            raise ConfigError(f"host {host!r} has no address: {error.strerror}") from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"rank 0 is missing: nobody accepts connections at {address_text(host, port)} after "
                    f"{timeout:.3g} s ({error.strerror or error}); check the address, and that rank 0 runs"
                ) from error
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def local_address_towards(host: str, port: int) -> str:
    """The address of this host from which `host` is reached. Sends nothing.

    Raises:
        ConfigError: when there is no way to it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"this host has no way to {host!r}: {error.strerror}") from error
