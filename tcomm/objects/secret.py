"""The secret that the processes of a job share, and where none is needed."""

from __future__ import annotations

import ipaddress
import socket

from tcomm.config import EngineConfig
from tcomm.errors import ConfigError

__all__ = ["is_loopback", "job_secret", "require_secret"]


def job_secret() -> bytes | None:
    """TCOMM_SECRET, or None where it is unset or empty."""
    return EngineConfig.from_environment().secret.encode() or None


def is_loopback(host: str) -> bool:
    """Whether a name or address is reached from this machine alone, whatever it resolves to.

    Raises:
        ConfigError: when it resolves to nothing.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is no address and resolves to none: {error}") from error
    return all(_is_loopback(str(address[0])) for *_, address in found)


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def require_secret(host: str) -> bytes | None:
    """The secret for connections at `host`: the job's; None on loopback where the job has none.

    Raises:
        ConfigError: when `host` is reached from other machines, and the job has no secret.
    """
    secret = job_secret()
    if secret is None and not is_loopback(host):
        raise ConfigError(
            f"{host!r} is reached from other machines, which needs a secret that all processes of the job "
            "share; set TCOMM_SECRET to the same 32 random bytes in hexadecimal in all of them "
            '(python -c "import secrets; print(secrets.token_hex(32))"), or use 127.0.0.1'
        )
    return secret
