"""Ranks that meet through a store: arrivals, one verdict a layer, and whom to blame."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import cast

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tcomm.errors import CommError, PeerLostError, PeerTimeoutError
from tcomm.groups.setup import Membership, split_exchange
from tcomm.memory.exchange import StoreExchange
from tcomm.memory.pause import Pause

__all__ = ["Meeting", "Trouble"]

_COMMIT = b"commit"
_PAUSE_SECONDS = 0.01
_SECONDS_TO_TELL = 0.5
"""How long one waits to hear that a peer is stuck itself: deadlines run out at nearly the same time."""


class Trouble(msgspec.Struct, frozen=True):
    """Why a rank cannot go on."""

    is_late: bool
    """Peers are late, and not known to be dead."""
    peers: tuple[int, ...]
    """Who is at fault."""
    told: str
    """What the rank found."""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Trouble:
        """What an error of this rank means for the others."""
        if isinstance(error, CommError) and error.peers:
            return cls(isinstance(error, PeerTimeoutError), tuple(error.peers), str(error))
        return cls(False, (rank,), f"rank {rank} failed: {type(error).__name__}: {error}")


class Meeting:
    """Calls of a group's ranks that meet in its store, each with steps, and a verdict. One thread at a time.

    Args:
        members: the ranks; their exchange goes over a store.
    """

    def __init__(self, members: Membership) -> None:
        exchange = split_exchange(members, "moving")
        assert isinstance(exchange, StoreExchange)
        self.name = members.name
        self.rank, self.world_size = exchange.rank, exchange.world_size
        self._store = cast("Store", exchange.store)
        self._prefix = exchange.prefix
        self._number = -1

    def begin(self) -> None:
        """Take the next call, and remove what this rank left of the call before the last."""
        self._number += 1
        old = [self._key(f"{step}/{self.rank}", 2) for step in ("before", "after", "stuck")]
        if self.rank == 0:
            old += [self._key(step, 2) for step in ("verdict", "settled")]
        with self._storing():
            for key in old:
                if self._number > 1 and self._store.check([key]):
                    self._store.delete_key(key)

    def gather(self, step: str, payload: bytes, deadline: float | None) -> list[bytes]:
        """Every rank's payload for a step of this call. **Collective.**

        Args:
            step: `before` or `after`.
            payload: this rank's.
            deadline: on the monotonic clock; None: never.

        Raises:
            PeerTimeoutError: naming those who did not come.
            CommError: the verdict is already to give up.
        """
        keys = [self._key(f"{step}/{rank}") for rank in range(self.world_size)]
        pause = Pause()
        with self._storing():
            self._store.set(keys[self.rank], payload.hex())
            while not self._store.check(keys):
                self.refuse_verdict()
                if deadline is not None and time.monotonic() >= deadline:
                    missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                    if missing:
                        raise self._error(PeerTimeoutError, f"ranks {missing} did not come in time", missing)
                pause()
            return [bytes.fromhex(self._store.get(key).decode()) for key in keys]

    def refuse_verdict(self) -> None:
        """Raise when the verdict on this call is to give up."""
        if (verdict := self._verdict()) not in (None, _COMMIT):
            self._give_up(verdict)

    def _verdict(self) -> bytes | None:
        key = self._key("verdict")
        with self._storing():
            return bytes(self._store.get(key)) if self._store.check([key]) else None

    def commit(self) -> None:
        """Propose to commit, after all have come to the last step.

        Raises:
            CommError: somebody proposed first to give up.
        """
        verdict = self._propose(_COMMIT)
        if verdict != _COMMIT:
            self._give_up(verdict)

    def give_up(self, error: BaseException) -> bool:
        """Propose to give up; whether that is the verdict, of this rank's proposal.

        Returns:
            False when the verdict is to commit: then all that this rank needs has come.

        Raises:
            CommError: another proposal was first, which names somebody too.
        """
        verdict, mine = self._verdict(), b""
        if verdict is None:
            mine = msgspec.json.encode(self._traced(Trouble.of(error, self.rank)))
            verdict = self._propose(mine)
        if verdict not in (mine, _COMMIT):
            self._give_up(verdict)
        return verdict == mine

    def _traced(self, trouble: Trouble) -> Trouble:
        """Whose fault it is in the end: who is waited for may be stuck for somebody else's sake."""
        with self._storing():
            self._store.set(self._key(f"stuck/{self.rank}"), msgspec.json.encode(trouble).decode())
        deadline = time.monotonic() + _SECONDS_TO_TELL
        guilty: set[int] = set()
        asked, seen, is_late = list(trouble.peers), {self.rank}, trouble.is_late
        if self.rank in asked:
            return trouble
        for peer in asked:
            theirs = None if peer in seen else self._trouble_of(peer, deadline)
            if theirs is None and peer not in seen:
                guilty.add(peer)
            elif theirs is not None:
                asked += theirs.peers
                is_late = theirs.is_late
            seen.add(peer)
        return Trouble(is_late, tuple(sorted(guilty)) or trouble.peers, trouble.told)

    def _trouble_of(self, peer: int, deadline: float) -> Trouble | None:
        key = self._key(f"stuck/{peer}")
        with self._storing():
            while not self._store.check([key]):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_PAUSE_SECONDS)
            return msgspec.json.decode(self._store.get(key), type=Trouble)

    def settle(self, is_agreed: bool) -> bool:
        """After a verdict to commit: whether all do so now, by the first word of any rank.

        Args:
            is_agreed: this rank's.
        """
        return self._propose(_COMMIT if is_agreed else b"keep", "settled") == _COMMIT

    def _propose(self, told: bytes, what: str = "verdict") -> bytes:
        with self._storing():
            # The store makes it or gives what was there, at once: the first one counts.
            return bytes(self._store.compare_set(self._key(what), "", told.decode()))

    def _give_up(self, verdict: bytes) -> None:
        trouble = msgspec.json.decode(verdict, type=Trouble)
        kind = PeerTimeoutError if trouble.is_late else PeerLostError
        told = f"given up for the sake of ranks {list(trouble.peers)}: {trouble.told}"
        raise self._error(kind, told, trouble.peers)

    def _error(self, kind: type[CommError], told: str, peers: Sequence[int]) -> CommError:
        return kind(
            f"moving experts in group {self.name!r}, call #{self._number}: {told}",
            group=self.name, op="move_experts", seq=self._number, rank=self.rank, peers=peers,
        )  # fmt: skip

    def _key(self, what: str, ago: int = 0) -> str:
        return f"{self._prefix}/{self._number - ago}/{what}"

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise self._error(
                PeerLostError, f"the group's store is gone, and the verdict with it: {error}", ()
            ) from error
