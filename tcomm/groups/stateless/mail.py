"""Messages of any size in a store that should hold small ones: cut, read once, and forgotten."""

from __future__ import annotations

import contextlib

from tcomm.errors import DecodeError, PeerLostError
from tcomm.groups.stateless.sealed import SealedStore

__all__ = ["PIECE_NBYTES", "put_message", "remove_message", "take_message"]

PIECE_NBYTES = 1 << 20
"""Bytes of a message in one value of a store; a TCPStore takes 8 MiB at most."""
_COUNT_BYTES = 4
_MAX_PIECES = 1 << 16


def put_message(store: SealedStore, key: str, message: bytes) -> None:
    """Put a message down; nobody sees it before all of it is there."""
    cuts = range(PIECE_NBYTES, len(message), PIECE_NBYTES)
    for number, cut in enumerate(cuts, 1):
        store.set(_piece_key(key, number), message[cut : cut + PIECE_NBYTES])
    store.set(key, (1 + len(cuts)).to_bytes(_COUNT_BYTES, "little") + message[:PIECE_NBYTES])


def take_message(store: SealedStore, key: str, num_readers: int) -> bytes:
    """Read a message that is there. The last of its readers removes it.

    Raises:
        DecodeError: when it is not a message. It is gone nevertheless.
    """
    try:
        first = store.get(key)
        count = _count(first)
        keys = [_piece_key(key, number) for number in range(1, count)]
        if keys and not store.check(keys):
            raise DecodeError(f"pieces of the message {key!r} are missing")
        pieces = [store.get(piece) for piece in keys]
    except DecodeError:
        remove_message(store, key)
        raise
    # A store that ends now, with rank 0, takes nothing of what was read.
    with contextlib.suppress(PeerLostError):
        if num_readers == 1:
            _remove(store, key, count)
        elif store.add(f"{key}/read", 1) == num_readers:
            _remove(store, key, count)
            store.delete_key(f"{key}/read")
    return b"".join([first[_COUNT_BYTES:], *pieces])


def remove_message(store: SealedStore, key: str) -> None:
    """Remove a message, read or not, and however much of it is there."""
    count = 1
    if store.check([key]):
        try:
            count = _count(store.get(key))
        except DecodeError:
            count = 1
    _remove(store, key, count)
    store.delete_key(f"{key}/read")


def _remove(store: SealedStore, key: str, count: int) -> None:
    store.delete_key(key)
    for number in range(1, count):
        store.delete_key(_piece_key(key, number))


def _count(first: bytes) -> int:
    count = int.from_bytes(first[:_COUNT_BYTES], "little")
    if len(first) < _COUNT_BYTES or not 0 < count <= _MAX_PIECES:
        raise DecodeError("a value in the store does not begin with a number of pieces")
    return count


def _piece_key(key: str, number: int) -> str:
    return f"{key}/{number}"
