"""Reduce-scatter and reduce on a CPU: the algorithms of `tcomm.kernels.reduce_scatter`.

Prepared once per kind of call; numerics and contract are those of the kernels.
"""

from __future__ import annotations

import dataclasses

import torch

from tcomm.cpu.copies import SHORT_BYTES, Copies, Place
from tcomm.cpu.exchange import ExchangePlan, in_turn, staged_places
from tcomm.cpu.reduction import Own, Reduction, room_of
from tcomm.memory.arena import Arena
from tcomm.memory.base import Staging
from tcomm.memory.layout import exchange_pieces, part_offset
from tcomm.parts import Parts
from tcomm.signature import CallDescription

__all__ = ["make_reduce_scatter_plan"]


def make_reduce_scatter_plan(
    algorithm: str,
    arena: Arena,
    call: CallDescription,
    parts: Parts,
    op: str,
    dtype: torch.dtype,
    piece_nbytes: int = 0,
) -> ExchangePlan:
    """Prepare `algorithm` for tensors of which `parts` says which range belongs to whom.

    Args:
        algorithm: `push` or `pull`.
        arena: of the group, with staging.
        call: what the ranks compare.
        parts: of this rank, in elements; all that it receives has one length.
        op: `sum`, `avg`, `max` or `min`.
        dtype: element type.
        piece_nbytes: bytes of a part to handle at once, at most; 0: as many as fit. The same on every rank.
    """
    staging = arena.staging
    if staging is None:
        raise AssertionError("the arena has no staging")
    runs, first = [], 0
    pieces = exchange_pieces(algorithm, staging.layout, parts.scaled(dtype.itemsize), piece_nbytes)
    for piece in pieces:
        part = _Part(algorithm, staging, piece, dtype)
        reduction = Reduction(op, dtype, part.world_size, part.numel, room_of(staging))
        runs.append(_prepare(arena, call, part, reduction, first))
        first += part.numel
    return in_turn(runs)


def _prepare(
    arena: Arena, call: CallDescription, part: _Part, reduction: Reduction, first: int
) -> ExchangePlan:
    """The plan of a piece, whose result begins at element `first` of out."""
    channel, signature = arena.channel, call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    places = part.places()
    outgoing = [Copies(part.staging, parity, places).stage for parity in (0, 1)]
    reduces = [
        reduction.over(part.sources(parity), part.own, first) if part.numel else _reduce_nothing
        for parity in (0, 1)
    ]

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        outgoing[epoch & 1](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        reduces[epoch & 1](x, out)
        finish(epoch)

    return run


def _reduce_nothing(x: torch.Tensor, out: torch.Tensor) -> None:
    """For a rank that gets nothing."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Every rank's part for this one, of one piece.

    A short part of this rank's own is staged like the others: cheaper than a view of x at every call.
    """

    algorithm: str
    staging: Staging
    parts: Parts
    """In bytes."""
    dtype: torch.dtype

    @property
    def world_size(self) -> int:
        return self.parts.world_size

    @property
    def numel(self) -> int:
        """Elements of the result."""
        return self.parts.receives[self.parts.rank][1] // self.dtype.itemsize

    @property
    def own(self) -> Own | None:
        """This rank's own part, where it is read from x."""
        rank = self.parts.rank
        first, nbytes = self.parts.sends[rank]
        return None if nbytes <= SHORT_BYTES else (rank, first // self.dtype.itemsize)

    def places(self) -> list[Place]:
        """What this rank stages."""
        places = staged_places(self.algorithm, self.staging, self.parts)
        if self.own is None:
            rank = self.parts.rank
            offset = part_offset(self.algorithm, self.staging.layout, False, rank, rank)
            places.append(Place(rank, offset, *self.parts.sends[rank]))
        return places

    def sources(self, parity: int) -> list[torch.Tensor]:
        """Each rank's part for this one; this rank's own is there only where it is staged."""
        rank, layout = self.parts.rank, self.staging.layout
        sources = []
        for source in range(self.world_size):
            holder = source if self.algorithm == "pull" else rank
            offset = layout.half(parity) + part_offset(self.algorithm, layout, False, source, rank)
            sources.append(self.staging.buffer.peer(holder, (self.numel,), self.dtype, offset))
        return sources
