"""Exchanges: over a store, and for a world of one."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import NoReturn, Protocol

import torch.distributed as dist

from tcomm.errors import RendezvousError, TcommError
from tcomm.memory.pause import Pause

__all__ = ["LocalExchange", "Store", "StoreExchange"]

_HERE, _GAVE_UP = b"+", b"-"
"""What a value begins with, and what it is once its rank no longer waits."""


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


def _find_get_all(store: Store) -> Callable[[list[str]], Iterable[bytes]]:
    """How to get the values of keys that exist: in one request where the store can do that."""
    can_do: Callable[[], bool] | None = getattr(store, "has_extended_api", None)
    if can_do is not None and can_do():
        get_all: Callable[[list[str]], Iterable[bytes]] = store.multi_get  # type: ignore[attr-defined]
        return get_all
    return lambda keys: map(store.get, keys)


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
        self._get_all = _find_get_all(store)
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
            self.store.set(keys[self.rank], _HERE + payload)
            gathered = self._wait(keys, time.monotonic() + timeout, timeout, check)
            if round_ > 2:
                self.store.delete_key(self._key(round_ - 2, self.rank))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RendezvousError(f"the store of group {self.prefix!r} failed: {error}") from error
        except BaseException:
            self._give_up(round_)
            raise
        return gathered

    def _give_up(self, round_: int) -> None:
        """Undo a round that did not come together: it may be tried again, and who tries meets nothing old."""
        self._round = round_
        with contextlib.suppress(RuntimeError):
            self.store.set(self._key(round_, self.rank), _GAVE_UP)

    def _key(self, round_: int, rank: int) -> str:
        return f"{self.prefix}/{round_}/{rank}"

    def _gathered(self, keys: list[str]) -> list[bytes] | None:
        """Every rank's payload; None while one has not come, or has given up."""
        if not self.store.check(keys):
            return None
        values = list(map(bytes, self._get_all(keys)))
        return None if _GAVE_UP in values else [value[1:] for value in values]

    def _gathered_after_all(self, keys: list[str], check: Callable[[], None]) -> list[bytes] | None:
        """What `_gathered` gives just after `check` raised, and None before; else raises what it does."""
        try:
            check()
        except TcommError:
            # A peer that came, and left as soon as all had come, is not missing.
            gathered = self._gathered(keys)
            if gathered is None:
                raise
            return gathered
        return None

    def _wait(
        self, keys: list[str], deadline: float, timeout: float, check: Callable[[], None] | None
    ) -> list[bytes]:
        # Store.wait would do, but a TCPStore writes a warning to stderr each time that it runs out.
        pause = Pause()
        while (gathered := self._gathered(keys)) is None:
            if time.monotonic() >= deadline:
                self._refuse_missing(keys, timeout)
            if check is not None and (gathered := self._gathered_after_all(keys, check)) is not None:
                break
            pause()
        return gathered

    def _refuse_missing(self, keys: list[str], timeout: float) -> NoReturn:
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        told = f"ranks {missing} of {self.world_size} did not come to {self.prefix!r} within {timeout:g} s"
        if not missing:
            told = f"all {self.world_size} ranks came to {self.prefix!r}, and some gave up before the last"
        raise RendezvousError(
            f"{told}; check that they are running and call the same things in the same order, or give a "
            "longer timeout"
        )
