"""How the processes of a stateless group find one another at an address, and agree that they have.

Rank 0 opens a group under its name: `open` holds a random number, the generation, and what rank 0 runs. Each
rank puts its claim down below the generation; a rank that is taken stays with whoever came first. Whoever
sees that all have come, that somebody differs or is dead, or that its time is up, proposes a verdict, and the
first proposal counts for everybody: all ranks have the group, or none has.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time

import msgspec

from tcomm.errors import DecodeError, DuplicateRankError, GroupMismatchError, RendezvousError
from tcomm.groups.differences import describe_differences
from tcomm.groups.stateless.peers import describe_process, is_running
from tcomm.groups.stateless.sealed import SealedStore
from tcomm.memory.liveness import Identity, my_identity
from tcomm.memory.pause import Pause

__all__ = ["Meeting", "is_open", "meet"]

_PROTOCOL = "1"
_LOOK_SECONDS = 0.25
_GRACE_SECONDS = 1.0
"""For which an early process may be taken for a second one of its rank."""


class _Claim(msgspec.Struct, frozen=True):
    """What a process says of itself when it takes a rank."""

    nonce: str
    identity: Identity
    same: dict[str, str]


class _Opening(msgspec.Struct, frozen=True):
    """What rank 0 says of the group that it opens."""

    generation: str
    world_size: int
    before: tuple[str, int] = ("", 0)
    """Generation and size of the group that it opened before, whose keys nobody reads any more."""


class _Verdict(msgspec.Struct, frozen=True):
    """How a generation ended."""

    kind: str
    """`missing`, `different`, or empty: all have come."""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A group that came together."""

    generation: str
    """Random, and the same on every rank."""
    identities: tuple[Identity, ...]
    """The process of each rank."""


def meet(
    hall: SealedStore, name: str, rank: int, world_size: int, timeout: float, settings: dict[str, str]
) -> Meeting:
    """Bring the ranks of a group together. **Collective.**

    Args:
        hall: what all groups of an address share.
        name: of the group; the same on every rank, and no other group's that meets at the same time.
        rank: this process.
        world_size: number of ranks.
        timeout: seconds.
        settings: what has to be the same on every rank, besides the number of ranks.

    Raises:
        DuplicateRankError: when another process has this rank.
        GroupMismatchError: on every rank, when they differ; shows in what. Also when the missing ranks are
            known to wait for another group.
        RendezvousError: on every rank that came, when some did not; names them and the address.
    """
    guest = _Guest(hall, name, rank, world_size, timeout, settings)
    whereabouts = _whereabouts(rank)
    hall.set(whereabouts, name.encode())
    try:
        generation = guest.open() if rank == 0 else guest.find()
        identities = guest.wait_for_all(generation)
    except (DecodeError, msgspec.MsgspecError) as error:
        raise GroupMismatchError(f"rank {rank} cannot come to group {name!r}: {error}") from error
    # Who failed leaves word of where it was.
    hall.delete_key(whereabouts)
    return Meeting(generation, identities)


def is_open(hall: SealedStore, name: str) -> bool:
    """Whether somebody opened a group of this name there."""
    return hall.below(f"group/{name}").check(["open"])


def _whereabouts(rank: int) -> str:
    return f"whereabouts/{rank}"


class _Guest:
    """One rank on its way into a group."""

    def __init__(
        self,
        hall: SealedStore,
        name: str,
        rank: int,
        world_size: int,
        timeout: float,
        settings: dict[str, str],
    ) -> None:
        self._hall, self._desk = hall, hall.below(f"group/{name}")
        self._name, self._rank, self._world_size = name, rank, world_size
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        same = {"rendezvous": _PROTOCOL, "world size": str(world_size), **settings}
        self._claim = _Claim(secrets.token_hex(8), my_identity(), same)
        self._holder: Identity | None = None
        self._failure = ""

    def open(self) -> str:
        """Begin a new generation, as rank 0."""
        before = ("", 0)
        if self._desk.check(["open"]):
            last = msgspec.msgpack.decode(self._desk.get("open"), type=_Opening)
            self._forget(*last.before)
            before = (last.generation, last.world_size)
        opening = _Opening(secrets.token_hex(8), self._world_size, before)
        self._take(opening.generation)
        self._desk.set("open", msgspec.msgpack.encode(opening))
        return opening.generation

    def find(self) -> str:
        """The generation in which this process gets its rank."""
        taken: dict[str, float] = {}
        pause = Pause()
        while time.monotonic() < self._deadline:
            if self._desk.check(["open"]):
                generation = msgspec.msgpack.decode(self._desk.get("open"), type=_Opening).generation
                if generation not in taken and not self._is_over(generation):
                    self._holder = self._take(generation)
                    if self._holder is None:
                        return generation
                    taken[generation] = time.monotonic()
                if generation in taken:
                    self._refuse_second(generation, time.monotonic() - taken[generation])
            pause()
        if (
            self._holder is not None
            and self._holder != my_identity()
            and is_running(self._holder) is not False
        ):
            raise self._duplicate()
        raise self._missing([0])

    def wait_for_all(self, generation: str) -> tuple[Identity, ...]:
        """The processes of all ranks, once all have come."""
        verdict_key = f"{generation}/verdict"
        keys = [_claim_key(generation, rank) for rank in range(self._world_size)]
        pause, looked = Pause(), -math.inf
        while True:
            is_decided, now = self._desk.check([verdict_key]), time.monotonic()
            if is_decided or now - looked > _LOOK_SECONDS or now >= self._deadline or self._desk.check(keys):
                looked = now
                claims = self._claims(generation)
                mine = self._judge(claims)
                if mine is not None or is_decided:
                    self._obey(self._agree(verdict_key, mine), mine)
                    return tuple(claims[rank].identity for rank in range(self._world_size))
            pause()

    def _agree(self, verdict_key: str, mine: _Verdict | None) -> _Verdict:
        proposal = msgspec.msgpack.encode(mine or _Verdict("missing"))
        return msgspec.msgpack.decode(self._desk.decide(verdict_key, proposal), type=_Verdict)

    def _obey(self, agreed: _Verdict, mine: _Verdict | None) -> None:
        # A stray that differs from a group which is complete without it goes away alone.
        verdict = agreed if agreed.kind or mine is None else mine
        if verdict.kind == "different":
            raise GroupMismatchError(verdict.text)
        if verdict.kind:
            raise RendezvousError(verdict.text)

    def _judge(self, claims: dict[int, _Claim]) -> _Verdict | None:
        """What this process thinks of a generation by now; None while it may still come together."""
        same = {rank: claim.same for rank, claim in claims.items()}
        if text := describe_differences(self._name, same):
            return _Verdict("different", text)
        missing = [rank for rank in range(self._world_size) if rank not in claims]
        if not missing:
            return _Verdict("")
        dead = [rank for rank, claim in claims.items() if is_running(claim.identity) is False]
        if dead:
            told = ", ".join(f"rank {rank} ({describe_process(claims[rank].identity)})" for rank in dead)
            return _Verdict("missing", f"{self._what()}: {told} ended before all had come")
        if time.monotonic() < self._deadline:
            return None
        error = self._missing(missing)
        return _Verdict("different" if isinstance(error, GroupMismatchError) else "missing", str(error))

    def _take(self, generation: str) -> Identity | None:
        """Claim this rank; whoever has it already, or None when it is ours."""
        proposal = msgspec.msgpack.encode(self._claim)
        decided = self._desk.decide(_claim_key(generation, self._rank), proposal)
        holder = msgspec.msgpack.decode(decided, type=_Claim)
        return None if holder.nonce == self._claim.nonce else holder.identity

    def _claims(self, generation: str) -> dict[int, _Claim]:
        found = {}
        for rank in range(self._world_size):
            key = _claim_key(generation, rank)
            if self._desk.check([key]):
                found[rank] = msgspec.msgpack.decode(self._desk.get(key), type=_Claim)
        return found

    def _is_over(self, generation: str) -> bool:
        """Whether a generation failed before this process came; rank 0 may open another one."""
        if not self._desk.check([f"{generation}/verdict"]):
            return False
        verdict = msgspec.msgpack.decode(self._desk.get(f"{generation}/verdict"), type=_Verdict)
        if verdict.kind == "different":
            raise GroupMismatchError(verdict.text)
        self._failure = verdict.text
        return bool(verdict.kind)

    def _refuse_second(self, generation: str, seconds: float) -> None:
        """Raise if the process that has our rank in a generation keeps it, and is not an earlier self."""
        assert self._holder is not None
        if self._holder == my_identity():
            return  # of an earlier group of this process; rank 0 will open the next one
        if not self._desk.check([f"{generation}/verdict"]):
            raise self._duplicate()
        if seconds > _GRACE_SECONDS and is_running(self._holder):
            raise self._duplicate()

    def _duplicate(self) -> DuplicateRankError:
        assert self._holder is not None
        return DuplicateRankError(
            f"another process ({describe_process(self._holder)}) also claims rank {self._rank} of "
            f"{self._what()}; give each process its own rank, or another group its own group_name= or port"
        )

    def _missing(self, missing: list[int]) -> RendezvousError:
        """The error that names the ranks that did not come, and where they are, as far as they said so."""
        elsewhere = {rank: name for rank in missing if (name := self._place_of(rank)) not in ("", self._name)}
        seconds = f"{self._timeout:.3g} s"
        are = f"ranks {missing} of {self._world_size} did not come to {self._what()} within {seconds}"
        if self._failure:
            are += f" (and before: {self._failure})"
        if elsewhere:
            told = ", ".join(f"rank {rank} came to {name!r}" for rank, name in elsewhere.items())
            return GroupMismatchError(f"{are}; {told}: make the same groups in the same order on every rank")
        return RendezvousError(
            f"{are}; check that they run, and with the same address, or give a longer store_timeout="
        )

    def _place_of(self, rank: int) -> str:
        """The group that a rank waits for; empty where it waits for none."""
        if not self._hall.check([_whereabouts(rank)]):
            return ""
        try:
            return self._hall.get(_whereabouts(rank)).decode(errors="replace")
        except DecodeError:
            return "a group with another TCOMM_SECRET"

    def _forget(self, generation: str, world_size: int) -> None:
        keys = [_claim_key(generation, rank) for rank in range(world_size)]
        for key in [*keys, f"{generation}/verdict"] if generation else []:
            self._desk.delete_key(key)

    def _what(self) -> str:
        return f"group {self._name!r} at {self._desk.where}"


def _claim_key(generation: str, rank: int) -> str:
    return f"{generation}/claim/{rank}"
