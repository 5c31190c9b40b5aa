"""A store whose values tell who could have written them, and whose calls end.

A `TCPStore` asks nobody who he is, and waits for ever on a server that is stopped. Values are therefore
signed with the job's secret where there is one, together with their key and the group, and each call runs in
a thread that can be left behind.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import hmac
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from tcomm.errors import DecodeError, GroupClosedError, PeerLostError, PeerTimeoutError

__all__ = ["CallThread", "SealedStore"]

_PLAIN, _SIGNED, _TEXT = b"p", b"s", b"t"
_DIGEST_BYTES = 16
_LEAST_SECONDS = 0.5
"""For a call at the end of a wait, which tells the others that it ended."""

T = TypeVar("T")


class CallThread:
    """Makes calls one after another in a thread of its own, each with a deadline for whoever asked.

    The thread is a daemon and ends with the last reference to this object, or with the call it is stuck in.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.pid = os.getpid()
        threading.Thread(target=_serve, args=(self._calls,), name="tcomm-store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def call(self, seconds: float, function: Callable[..., T], *args: object) -> T:
        """What `function(*args)` returns or raises.

        Raises:
            TimeoutError: when it did not end within `seconds`; what has not begun by then never will.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, function, args))
        try:
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise


def _serve(calls: queue.SimpleQueue[Any]) -> None:
    while (item := calls.get()) is not None:
        future, function, args = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - it is raised where the call was made
            future.set_exception(error)
        del item, future, function, args


class SealedStore:
    """A store for one group.

    Args:
        store: a `torch.distributed.Store`.
        secret: signs values; None leaves them as they are.
        context: of the group, signed along, so that values of one group mean nothing in another.
        where: the store's address, for errors.
        thread: makes the calls; None calls at once, for a store in this process.
        seconds: that calls may take from now on, as `allow` sets it.
    """

    def __init__(
        self,
        store: Store,
        secret: bytes | None = None,
        context: str = "",
        where: str = "the store",
        thread: CallThread | None = None,
        seconds: float = 60.0,
    ) -> None:
        self.store = store
        self.where = where
        self.thread = thread
        self.secret = secret
        self._deadline = 0.0
        self.allow(seconds)
        self._context = context.encode()
        self._key = hashlib.blake2b(secret, person=b"tcomm store").digest() if secret else None
        self._pid = os.getpid()

    def below(self, prefix: str) -> SealedStore:
        """The part of this store whose keys begin with `prefix`, with values that mean nothing elsewhere."""
        store = PrefixStore(prefix, self.store)
        context = f"{self._context.decode()}/{prefix}"
        left = self._deadline - time.monotonic()
        return SealedStore(store, self.secret, context, self.where, self.thread, left)

    def allow(self, seconds: float) -> None:
        """Let calls take until so many seconds from now, and never less than a moment."""
        self._deadline = time.monotonic() + seconds

    def set(self, key: str, value: bytes) -> None:
        """Put a value down."""
        self._call(self.store.set, key, self._seal(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key that exists.

        Raises:
            DecodeError: when it was not written by a process with this one's secret.
        """
        return self._open(key, bytes(self._call(self.store.get, key)))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys exist."""
        return bool(self._call(self.store.check, list(keys)))

    def delete_key(self, key: str) -> bool:
        """Forget a key; whether it was there."""
        return bool(self._call(self.store.delete_key, key))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is not signed, and return it."""
        return int(self._call(self.store.add, key, amount))

    def decide(self, key: str, proposal: bytes) -> bytes:
        """The first value that anybody proposed for a key; the same for all who ask."""
        # Compared and set values are text in torch's stores.
        text = (_TEXT + base64.b64encode(self._seal(key, proposal))).decode()
        return self._open(key, bytes(self._call(self.store.compare_set, key, "", text)))

    def _call(self, function: Callable[..., Any], *args: object) -> Any:
        if os.getpid() != self._pid:
            raise GroupClosedError(
                f"{self.where} belongs to process {self._pid}, not to its child {os.getpid()}"
            )
        try:
            if self.thread is None:
                return function(*args)
            left = max(self._deadline - time.monotonic(), _LEAST_SECONDS)
            return self.thread.call(left, function, *args)
        except TimeoutError as error:
            raise PeerTimeoutError(f"rank 0 does not answer: {self.where} is silent", peers=(0,)) from error
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            reason = str(error).partition("\n")[0]
            raise PeerLostError(f"rank 0 is gone, and {self.where} with it: {reason}", peers=(0,)) from error

    def _digest(self, key: str, value: bytes) -> bytes:
        assert self._key is not None
        head = b"".join(len(part).to_bytes(4, "little") + part for part in (self._context, key.encode()))
        return hashlib.blake2b(head + value, key=self._key, digest_size=_DIGEST_BYTES).digest()

    def _seal(self, key: str, value: bytes) -> bytes:
        if self._key is None:
            return _PLAIN + value
        return _SIGNED + self._digest(key, value) + value

    def _open(self, key: str, sealed: bytes) -> bytes:
        if sealed[:1] == _TEXT:
            try:
                sealed = base64.b64decode(sealed[1:], validate=True)
            except ValueError as error:
                raise DecodeError(f"{key!r} in {self.where} is not what this group writes") from error
        kind, digest, value = sealed[:1], sealed[1 : 1 + _DIGEST_BYTES], sealed[1 + _DIGEST_BYTES :]
        if self._key is None:
            if kind == _SIGNED:
                raise DecodeError(
                    f"{key!r} in {self.where} is signed with a secret that this process does not have; give "
                    "every process of the job the same TCOMM_SECRET"
                )
            if kind != _PLAIN:
                raise DecodeError(f"{key!r} in {self.where} is not what this group writes")
            return sealed[1:]
        if kind != _SIGNED or not hmac.compare_digest(digest, self._digest(key, value)):
            raise DecodeError(
                f"{key!r} in {self.where} was not written by a process with this one's TCOMM_SECRET; give "
                "every process of the job the same one, and keep others from the address"
            )
        return value
