"""A barrier over a store that all ranks pass, or none."""

from __future__ import annotations

import time
from collections.abc import Callable

from tcomm.errors import CommError, PeerLostError, PeerTimeoutError
from tcomm.groups.stateless.sealed import SealedStore
from tcomm.memory.pause import Pause

__all__ = ["Barrier"]

_LOOK_SECONDS = 0.25
_PASSED, _LOST, _LATE = "passed", "lost", "late"


class Barrier:
    """One barrier: arrivals, one verdict on them that whoever knows first proposes, and departures.

    Args:
        store: of the group.
        rank: this process.
        world_size: number of ranks.
        number: of this barrier within the group.
        timeout: seconds.
        epitaph: says how a rank's process ended; empty while it runs.
    """

    def __init__(
        self,
        store: SealedStore,
        rank: int,
        world_size: int,
        number: int,
        timeout: float,
        epitaph: Callable[[int], str],
    ) -> None:
        self._store = store
        self._rank = rank
        self._timeout = timeout
        self._epitaph = epitaph
        self._arrivals = [f"barrier/{number}/arrival/{peer}" for peer in range(world_size)]
        self._departures = [f"barrier/{number}/departure/{peer}" for peer in range(world_size)]
        self._verdict = f"barrier/{number}/verdict"

    def run(self) -> None:
        """Wait for all ranks.

        Raises:
            PeerTimeoutError, PeerLostError: when not all came; the same on every rank.
        """
        deadline = time.monotonic() + self._timeout
        self._signal("arrival", self._arrivals[self._rank])
        kind, _, text = self._await_verdict(deadline).partition(":")
        if kind != _PASSED:
            error = PeerLostError if kind == _LOST else PeerTimeoutError
            raise error(text, peers=self._missing(self._arrivals))
        self._signal("departure", self._departures[self._rank])
        if self._rank == 0:
            self._await_departures(deadline)
            for key in [*self._arrivals, *self._departures, self._verdict]:
                self._store.delete_key(key)

    def _signal(self, what: str, key: str) -> None:
        try:
            self._store.set(key, b"")
        except CommError as error:
            raise type(error)(f"Failed to signal barrier {what}: {error}", peers=error.peers) from error

    def _await_verdict(self, deadline: float) -> str:
        pause, looked = Pause(), time.monotonic()
        while not self._store.check([self._verdict]):
            now = time.monotonic()
            if self._store.check(self._arrivals):
                return self._decide(_PASSED)
            if now - looked > _LOOK_SECONDS:
                looked = now
                ended = [
                    (rank, how) for rank in self._missing(self._arrivals) if (how := self._epitaph(rank))
                ]
                if ended:
                    told = ", ".join(f"rank {rank} ended ({how})" for rank, how in ended)
                    return self._decide(f"{_LOST}:Barrier failed: {told}")
            if now >= deadline:
                return self._decide(
                    f"{_LATE}:Barrier timed out after {self._timeout:.2f} seconds on rank {self._rank}; "
                    f"ranks {list(self._missing(self._arrivals))} had not come"
                )
            pause()
        return self._decide("")

    def _await_departures(self, deadline: float) -> None:
        pause = Pause()
        while not self._store.check(self._departures):
            if time.monotonic() >= deadline:
                late = self._missing(self._departures)
                raise PeerTimeoutError(
                    f"Barrier departure timed out after {self._timeout:.2f} seconds; ranks {list(late)} came "
                    "and did not leave",
                    peers=late,
                )
            pause()

    def _decide(self, proposal: str) -> str:
        return self._store.decide(self._verdict, proposal.encode()).decode(errors="replace")

    def _missing(self, keys: list[str]) -> tuple[int, ...]:
        return tuple(rank for rank, key in enumerate(keys) if not self._store.check([key]))
