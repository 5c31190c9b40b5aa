"""The two-sided exchange of tokens on a CPU: rows stream through rings with credits, both ways at once."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from tcomm.cpu.moe_counts import swap_counts
from tcomm.memory.arena import Arena
from tcomm.memory.control import Word
from tcomm.memory.rings import HEAD, RECEIVED, RING_SLOTS, SENT, TAIL, Pieces, RingLayout
from tcomm.memory.wait import SET_SHIFT, Wait
from tcomm.signature import CallDescription

__all__ = ["announce", "exchange_rows"]

_DONE_PHASE = 1
"""Arrivals of this phase say that a rank has sent and received all of a call."""
_YIELDS = 64


def announce(
    counts: torch.Tensor, arena: Arena, call: CallDescription, timeout: float | None
) -> torch.Tensor:
    """Tell every rank how many rows it will get from this one. **Collective.**

    Args:
        counts: [W] int64, for each rank.
        arena: of the group.
        call: what the ranks compare.
        timeout: seconds.

    Returns:
        [W] int64, from each rank.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    epoch = arena.channel.begin(call, timeout)
    received = swap_counts(arena, epoch, call, counts)
    arena.channel.finish(epoch)
    return received


def exchange_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    outgoing: tuple[torch.Tensor, torch.Tensor],
    incoming: tuple[torch.Tensor, torch.Tensor],
    layout: RingLayout,
    arena: Arena,
    call: CallDescription,
    timeout: float | None,
) -> None:
    """Send rows of x to other ranks, and put those that come from them into rows of out. **Collective.**

    Args:
        x: [rows, words], integers.
        out: [rows, words] of the same type; rows that nobody sends are not written.
        outgoing: [W, capacity] int64, which rows of x go to each rank, in order, and [W] int64, how many.
        incoming: likewise, which rows of out those from each rank become. What goes to this rank itself is
            copied.
        layout: of the rings in staging.
        arena: of the group.
        call: what the ranks compare, before anything moves.
        timeout: seconds that all waits may take together.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the waits.
    """
    channel, rank = arena.channel, arena.rank
    epoch = channel.begin(call, timeout)
    word = epoch << 32 | call.signature
    channel.publish(0, word)
    channel.await_peers(0, word)
    if x.shape[1]:
        sends, receives = _by_rank(*outgoing), _by_rank(*incoming)
        out.index_copy_(0, receives[rank], x.index_select(0, sends[rank]))
        streams: list[_Stream] = []
        for step in range(1, arena.world_size):
            peer = (rank + step) % arena.world_size
            streams.append(_Stream(_Sender(arena, layout, peer, x, sends[peer])))
            streams.append(_Stream(_Receiver(arena, layout, peer, out, receives[peer])))
        _run_all(streams, arena, word)
    channel.publish(_DONE_PHASE, word)
    channel.finish(epoch)


def _by_rank(table: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    return [row[:count] for row, count in zip(table, counts.tolist(), strict=True)]


class _End(Protocol):
    """One end of a ring."""

    peer: int
    num_pieces: int
    first: int
    """Slots of all calls before this one."""

    def limit(self) -> int:
        """How many slots of all calls may have been moved by now."""
        ...

    def move(self, piece: int) -> None:
        """Fill or empty the slot of a piece, and tell the peer."""
        ...


class _Stream:
    """What is left to do at one end of a ring."""

    def __init__(self, end: _End) -> None:
        self._end = end
        self._done = 0
        self.peer = end.peer

    def advance(self) -> bool:
        """Move what can be moved now; whether that was anything."""
        end, before = self._end, self._done
        limit = min(end.limit() - end.first, end.num_pieces)
        while self._done < limit:
            end.move(self._done)
            self._done += 1
        return self._done > before

    @property
    def is_over(self) -> bool:
        """Whether all has been moved."""
        return self._done == self._end.num_pieces


class _Ring:
    """What both ends have: rows, how they are cut, and words."""

    count: int
    """Kind of the count of slots of all calls that this end keeps for itself."""

    def __init__(
        self, arena: Arena, layout: RingLayout, peer: int, rows: torch.Tensor, index: torch.Tensor
    ) -> None:
        staging = arena.staging
        assert staging is not None
        self.peer = peer
        self._layout, self._rank = layout, arena.rank
        self._base = staging.layout.half(0)
        self._buffer = staging.buffer
        self._own, self._theirs = self._words(arena.rank), self._words(peer)
        self._rows, self._index = rows, index
        self._size = rows.itemsize
        self._pieces = Pieces(rows.shape[1] * self._size, layout.slot_nbytes)
        self.num_pieces = self._pieces.count(len(index))
        self.first = self._own[layout.word(self.count, peer, 0)]

    def _words(self, rank: int) -> memoryview[int]:
        return self._buffer.peer(rank).numpy().data[self._base :][: self._layout.slots_at].cast("Q")

    def _part(self, piece: int) -> tuple[torch.Tensor, slice]:
        """The rows of a piece, and which words of each."""
        block, column = divmod(piece, self._pieces.num_columns)
        width = self._pieces.width // self._size
        rows = self._index[block * self._pieces.num_rows : (block + 1) * self._pieces.num_rows]
        return rows, slice(column * width, min((column + 1) * width, self._rows.shape[1]))

    def _slot(self, holder: int, source: int, turn: int, rows: int, words: slice) -> torch.Tensor:
        offset = self._base + self._layout.slot(source, 0, turn)
        return self._buffer.peer(holder, (rows, words.stop - words.start), self._rows.dtype, offset)

    def _publish(self, kind: int, count: int) -> None:
        self._theirs[self._layout.word(kind, self._rank, 0)] = count
        self._own[self._layout.word(self.count, self.peer, 0)] = count


class _Sender(_Ring):
    """Fills the ring of this rank at a peer, as far as there are credits."""

    count = SENT

    def limit(self) -> int:
        return self._own[self._layout.word(TAIL, self.peer, 0)] + RING_SLOTS

    def move(self, piece: int) -> None:
        turn = self.first + piece
        rows, words = self._part(piece)
        slot = self._slot(self.peer, self._rank, turn, len(rows), words)
        torch.index_select(self._rows[:, words], 0, rows, out=slot)
        self._publish(HEAD, turn + 1)


class _Receiver(_Ring):
    """Empties the ring of a peer at this rank, as far as it is filled."""

    count = RECEIVED

    def limit(self) -> int:
        return self._own[self._layout.word(HEAD, self.peer, 0)]

    def move(self, piece: int) -> None:
        turn = self.first + piece
        rows, words = self._part(piece)
        self._rows[:, words].index_copy_(0, rows, self._slot(self._rank, self.peer, turn, len(rows), words))
        self._publish(TAIL, turn + 1)


def _run_all(streams: list[_Stream], arena: Arena, word: int) -> None:
    """Move all pieces, some here and some there, so that no two ranks wait for each other's credits."""
    idle = 0
    while streams:
        moved = [stream.advance() for stream in streams]
        streams = [stream for stream in streams if not stream.is_over]
        idle = 0 if any(moved) else idle + 1
        if idle > _YIELDS:
            _await_any(streams, arena, word)
            idle = 0
        elif idle:
            os.sched_yield()


def _await_any(streams: list[_Stream], arena: Arena, word: int) -> None:
    """Wait until one of these can move; peers that are done with the call have done all that it takes."""
    peers = {stream.peer for stream in streams}
    chosen = sum(1 << peer for peer in peers)
    wait = Wait(arena.channel, _DONE_PHASE | chosen << SET_SHIFT, 0, word)
    try:
        while True:
            is_over = wait.step()
            moved = [stream.advance() for stream in streams]
            if any(moved):
                return
            if is_over:
                raise AssertionError(f"ranks {sorted(peers)} are done, and rows to or from them are not")
            wait.pause()
    finally:
        arena.channel.words[Word.WAITING_FOR] = 0
