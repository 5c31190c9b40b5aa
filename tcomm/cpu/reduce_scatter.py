"""Reduce-scatter and reduce on a CPU: the algorithms of `tcomm.kernels.reduce_scatter`.

Prepared once per kind of call; numerics and contract are those of the kernels.
"""

from __future__ import annotations

import torch

from tcomm.cpu.copies import SHORT_BYTES, Copies, Place
from tcomm.cpu.exchange import ExchangePlan, in_turn, staged_places
from tcomm.cpu.reduction import make_reduction
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
    size = dtype.itemsize
    pieces = exchange_pieces(algorithm, staging.layout, parts.scaled(size), piece_nbytes)
    runs, first = [], 0
    for piece in pieces:
        reduction = _Reduction(algorithm, staging, piece, op, dtype, first)
        runs.append(_prepare(algorithm, arena, staging, call, piece, reduction))
        first += reduction.numel
    return in_turn(runs)


def _prepare(
    algorithm: str,
    arena: Arena,
    staging: Staging,
    call: CallDescription,
    parts: Parts,
    reduction: _Reduction,
) -> ExchangePlan:
    channel, signature = arena.channel, call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    places = staged_places(algorithm, staging, parts)
    if reduction.stages_own:
        rank = parts.rank
        offset = part_offset(algorithm, staging.layout, False, rank, rank)
        places.append(Place(rank, offset, *parts.sends[rank]))
    outgoing = [Copies(staging, parity, places).stage for parity in (0, 1)]

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        outgoing[epoch & 1](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        reduction(epoch & 1, x, out)
        finish(epoch)

    return run


class _Reduction:
    """Reduces every rank's part for this one, of one piece.

    A short part of this rank's own is staged like the others: cheaper than a view of x at every call.
    """

    def __init__(
        self, algorithm: str, staging: Staging, parts: Parts, op: str, dtype: torch.dtype, first: int
    ) -> None:
        rank, size = parts.rank, dtype.itemsize
        self.numel = parts.receives[rank][1] // size
        """Elements of the result."""
        self.stages_own = 0 < self.numel * size <= SHORT_BYTES
        """Whether this rank's own part has to be staged."""
        self._rank = rank
        self._sources = [_sources(algorithm, staging, parts, p, dtype, self.numel) for p in (0, 1)]
        self._reduce = make_reduction(op, dtype, parts.world_size, self.numel)
        start = parts.sends[rank][0] // size
        self._own = slice(start, start + self.numel)
        self._result = slice(first, first + self.numel)
        # A reduction may write over its first source, or the second of two.
        self._may_overwrite = rank == 0 or parts.world_size == 2

    def __call__(self, parity: int, x: torch.Tensor, out: torch.Tensor) -> None:
        sources = self._sources[parity]
        if not self.stages_own:
            if not self.numel:
                return
            mine = x.view(-1)[self._own]
            sources = sources.copy()
            keeps = self._may_overwrite or x.data_ptr() != out.data_ptr()
            sources[self._rank] = mine if keeps else mine.clone()
        flat = out if out.dim() == 1 else out.view(-1)
        self._reduce(sources, flat if flat.numel() == self.numel else flat[self._result])


def _sources(
    algorithm: str, staging: Staging, parts: Parts, parity: int, dtype: torch.dtype, numel: int
) -> list[torch.Tensor]:
    """Each rank's part for this one; this rank's own only where it is staged."""
    rank, layout = parts.rank, staging.layout
    sources = []
    for source in range(parts.world_size):
        holder = source if algorithm == "pull" else rank
        offset = layout.half(parity) + part_offset(algorithm, layout, False, source, rank)
        sources.append(staging.buffer.peer(holder, (numel,), dtype, offset))
    return sources
