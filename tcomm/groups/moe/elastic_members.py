"""Ranks that come and go: how those that stay and those that join meet, over a store of all of them."""

from __future__ import annotations

import contextlib
import secrets
import time

import msgspec

from tcomm.errors import ConfigError, GroupMismatchError, RendezvousError
from tcomm.groups.setup import Membership, from_store
from tcomm.memory.exchange import Store
from tcomm.memory.pause import Pause

__all__ = ["ElasticMembers", "Facts"]

_PREFIX = "tcomm/elastic"


class Facts(msgspec.Struct, frozen=True):
    """What an exchange is made for, as far as a rank knows: all that know have to know the same."""

    max_tokens: int
    hidden: int


class _Turn(msgspec.Struct, frozen=True):
    """What rank 0 tells the others of the next group."""

    number: int
    name: str
    num_ranks: int


class ElasticMembers:
    """One rank of a group whose number of ranks changes. Rank 0 stays as long as there is a group.

    Who is in it reads what rank 0 writes for this turn; who is not yet, what rank 0 writes for him. Each
    group has a name of its own, so that nothing of one before is met.

    Args:
        store: of all ranks that there ever are.
        rank: this process; it keeps its number.
        seconds: that a meeting may take.
    """

    def __init__(self, store: Store, rank: int, seconds: float) -> None:
        self.store = store
        self.rank = rank
        self._seconds = seconds
        self._turn = 0
        self._num_ranks = 0

    @property
    def num_ranks(self) -> int:
        """Ranks of the group that this rank was last in; 0 before the first."""
        return self._num_ranks

    def meet(self, num_ranks: int, facts: Facts | None) -> tuple[Membership, Facts | None]:
        """Ranks 0 to `num_ranks` - 1 make the next group. **Collective** among them.

        Args:
            num_ranks: of the next group.
            facts: what this rank knows, if anything.

        Returns:
            The group, and what any of them knows.

        Raises:
            ConfigError: when this rank is not to be in it.
            GroupMismatchError: when the ranks want different things.
            RendezvousError: when one did not come.
        """
        if not self.rank < num_ranks:
            raise ConfigError(f"rank {self.rank} is not among {num_ranks} ranks")
        turn = self._tell(num_ranks) if self.rank == 0 else self._hear()
        self._turn = turn.number
        if turn.num_ranks != num_ranks:
            raise GroupMismatchError(
                f"rank {self.rank} is to be one of {num_ranks} ranks, and rank 0 calls {turn.num_ranks}"
            )
        members = from_store(self.store, self.rank, num_ranks, turn.name)
        try:
            told = members.exchange.all_gather(msgspec.msgpack.encode(facts), self._seconds)
        except BaseException:
            self._call_off(num_ranks)
            raise
        known = {found for data in told if (found := msgspec.msgpack.decode(data, type=Facts | None))}
        if len(known) > 1:
            raise GroupMismatchError(
                f"ranks of {turn.name!r} exchange different tokens: {sorted(map(str, known))}"
            )
        self._num_ranks = num_ranks
        return members, next(iter(known), None)

    def leave(self) -> None:
        """Be in no group any more: the next one is joined anew. Not collective."""
        self._num_ranks = 0

    def _tell(self, num_ranks: int) -> _Turn:
        number = self._turn + 1
        turn = _Turn(number, f"elastic/{number}/{secrets.token_hex(4)}", num_ranks)
        data = msgspec.msgpack.encode(turn)
        self.store.set(f"{_PREFIX}/turn/{number}", data)
        for rank in self._called(num_ranks):
            self.store.set(f"{_PREFIX}/call/{rank}", data)
        return turn

    def _called(self, num_ranks: int) -> range:
        """Ranks that are not there yet."""
        return range(max(1, self._num_ranks), num_ranks)

    def _call_off(self, num_ranks: int) -> None:
        """Who comes later is not to follow a call to a meeting that is over."""
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                for rank in self._called(num_ranks):
                    self.store.delete_key(f"{_PREFIX}/call/{rank}")

    def _hear(self) -> _Turn:
        joins = self._num_ranks == 0
        key = f"{_PREFIX}/call/{self.rank}" if joins else f"{_PREFIX}/turn/{self._turn + 1}"
        if not joins:
            self._turn += 1
        turn = msgspec.msgpack.decode(self._read(key), type=_Turn)
        if joins:
            self.store.delete_key(key)
        return turn

    def _read(self, key: str) -> bytes:
        deadline, pause = time.monotonic() + self._seconds, Pause()
        while not self.store.check([key]):
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"rank {self.rank} was not called within {self._seconds:g} s; rank 0 has to connect it"
                )
            pause()
        return bytes(self.store.get(key))
