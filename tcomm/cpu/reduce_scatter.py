"""Reduce-scatter and reduce on a CPU: the algorithms of `tcomm.kernels.reduce_scatter`.

Prepared once per kind of call; numerics and contract are those of the kernels.
"""

from __future__ import annotations

import torch

from tcomm.cpu.copies import Copies
from tcomm.cpu.exchange import ExchangePlan, staged_places
from tcomm.cpu.reduction import make_reduction
from tcomm.memory.arena import Arena, Staging
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
        numel = piece.receives[parts.rank][1] // size
        runs.append(_prepare(algorithm, arena, staging, call, piece, op, dtype, first, numel))
        first += numel
    if len(runs) == 1:
        return runs[0]

    def run_all(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        for run in runs:
            run(x, out, timeout)

    return run_all


def _prepare(
    algorithm: str,
    arena: Arena,
    staging: Staging,
    call: CallDescription,
    parts: Parts,
    op: str,
    dtype: torch.dtype,
    first: int,
    numel: int,
) -> ExchangePlan:
    """Reduce all ranks' parts for this one into out[first : first + numel]."""
    channel, rank, signature = arena.channel, arena.rank, call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    outgoing = [Copies(staging, p, staged_places(algorithm, staging, parts)).stage for p in (0, 1)]
    staged = [_sources(algorithm, staging, parts, parity, dtype, numel) for parity in (0, 1)]
    reduce = make_reduction(op, dtype, arena.world_size, numel)
    start = parts.sends[rank][0] // dtype.itemsize
    own, result = slice(start, start + numel), slice(first, first + numel)
    # A reduction may write over its first source, or the second of two.
    may_overwrite = rank == 0 or arena.world_size == 2

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        outgoing[epoch & 1](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        if numel:
            mine = x.view(-1)[own]
            sources = staged[epoch & 1].copy()
            sources[rank] = mine if may_overwrite or x.data_ptr() != out.data_ptr() else mine.clone()
            reduce(sources, out.view(-1)[result])
        finish(epoch)

    return run


def _sources(
    algorithm: str, staging: Staging, parts: Parts, parity: int, dtype: torch.dtype, numel: int
) -> list[torch.Tensor]:
    """Each rank's part for this one; this rank's own is not staged."""
    rank, layout = parts.rank, staging.layout
    sources = []
    for source in range(parts.world_size):
        holder = source if algorithm == "pull" else rank
        offset = layout.half(parity) + part_offset(algorithm, layout, False, source, rank)
        sources.append(staging.buffer.peer(holder, (numel,), dtype, offset))
    return sources
