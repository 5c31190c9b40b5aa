"""Exchanges: over a store, and for a world of one."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from tcomm.errors import RendezvousError, TcommError

__all__ = ["LocalExchange", "Store", "StoreExchange"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02


class Store(Protocol):
    """What is needed of a `torch.distributed.Store`."""

    def set(self, key: str, value: bytes) -> None:
        """Put a value down."""

    def get(self, key: str) -> bytes:
        """The value of a key that exists."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        ...

    def delete_key(self, key: str) -> bool:
        """Forget a key."""
        ...


class LocalExchange:
    """The exchange of a world of one."""

    rank = 0
    world_size = 1

    def split(self, name: str) -> LocalExchange:
        """Itself: it keeps nothing."""
        del name
        return self

    def all_gather(
        self, payload: bytes, timeout: float, check: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Return `[payload]`."""
        del timeout, check
        return [payload]


class StoreExchange:
    """An exchange over a `torch.distributed.Store`.

    Each round uses keys of its own below `prefix`; a rank removes its own key of the round before the
    last, which all have read by then, so a long-lived group leaves a few keys a rank in the store. Those of
    the first rounds stay: a second process that claims a rank has to find them.

    Args:
        store: shared by the ranks; used by one thread at a time.
        rank: this process, within the group.
        world_size: number of ranks.
        prefix: the same on all ranks of the group, and no other group's.
    """

    def __init__(self, store: Store, rank: int, world_size: int, prefix: str = "tcomm") -> None:
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self.prefix = prefix
        self._round = 0
        self._splits: collections.Counter[str] = collections.Counter()

    def split(self, name: str) -> StoreExchange:
        """Another exchange of the same ranks, by keys below those of this one that no other split has."""
        self._splits[name] += 1
        prefix = f"{self.prefix}/{name}/{self._splits[name]}"
        return StoreExchange(self.store, self.rank, self.world_size, prefix)

    def all_gather(
        self, payload: bytes, timeout: float, check: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Return every rank's payload, in rank order. **Collective.**

        A round that fails counts for nothing, and may be tried again.

        Raises:
            RendezvousError: when some ranks did not come within `timeout` seconds, or the store is gone.
        """
        round_ = self._round
        self._round += 1
        keys = [self._key(round_, rank) for rank in range(self.world_size)]
        try:
            self.store.set(keys[self.rank], payload)
            self._wait(keys, time.monotonic() + timeout, timeout, check)
            gathered = [bytes(self.store.get(key)) for key in keys]
            if round_ > 2:
                self.store.delete_key(self._key(round_ - 2, self.rank))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RendezvousError(f"the store of group {self.prefix!r} failed: {error}") from error
        except BaseException:
            self._withdraw(round_)
            raise
        return gathered

    def _withdraw(self, round_: int) -> None:
        """Undo a round that did not come together: who tries again meets nothing old."""
        self._round = round_
        with contextlib.suppress(RuntimeError):
            self.store.delete_key(self._key(round_, self.rank))

    def _key(self, round_: int, rank: int) -> str:
        return f"{self.prefix}/{round_}/{rank}"

    def _came_after_all(self, keys: list[str], check: Callable[[], None]) -> bool:
        """Whether all came just before `check` raised; else raises what it does, if anything."""
        try:
            check()
        except TcommError:
            # A peer that came, and left as soon as all had come, is not missing.
            if not self.store.check(keys):
                raise
            return True
        return False

    def _wait(
        self, keys: list[str], deadline: float, timeout: float, check: Callable[[], None] | None
    ) -> None:
        # Store.wait would do, but a TCPStore writes a warning to stderr each time that it runs out.
        pause = _SHORTEST_PAUSE
        while not self.store.check(keys):
            if time.monotonic() >= deadline:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                if not missing:
                    return
                raise RendezvousError(
                    f"ranks {missing} of {self.world_size} did not come to {self.prefix!r} within "
                    f"{timeout:g} s; check that they are running and call the same things in the same "
                    "order, or give a longer timeout"
                )
            if check is not None and self._came_after_all(keys, check):
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
