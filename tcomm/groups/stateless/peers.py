"""Whether the process behind a rank still runs, as far as that can be known from here."""

from __future__ import annotations

import os

from tcomm.memory.liveness import Identity, PeerProcess, my_identity

__all__ = ["describe_process", "is_running"]


def is_running(identity: Identity) -> bool | None:
    """Whether a process runs; None where its pid means nothing here."""
    peer = _watch(identity)
    if peer is None:
        return None
    try:
        return not peer.is_dead()
    finally:
        peer.close()


def describe_process(identity: Identity) -> str:
    """What is known of a process, for an error message."""
    peer = _watch(identity)
    if peer is None:
        return f"pid {identity.pid} elsewhere"
    try:
        return peer.describe()
    finally:
        peer.close()


def _watch(identity: Identity) -> PeerProcess | None:
    if identity.namespace != my_identity().namespace or not _can_watch():
        return None
    # Where pidfds work the lock is not looked at.
    return PeerProcess(identity, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def _can_watch() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True
