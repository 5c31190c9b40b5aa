"""All-reduce on a CPU: the algorithms of `tcomm.kernels.all_reduce`, prepared once per kind of call.

A plan holds everything that does not change between calls: tensor views of the staging of both parities, the
signature, the reduction. What is left for a call is two copies, one word per peer, and the arithmetic.

Numerics and contract are those of the kernels; the signature names the engine, so a rank that runs a kernel
and a rank that runs a plan disagree rather than mix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from tcomm.cpu.copies import SHORT_BYTES, memcpy
from tcomm.cpu.reduction import make_reduction
from tcomm.memory.arena import Arena
from tcomm.memory.base import Staging
from tcomm.memory.layout import cut, slice_numel
from tcomm.signature import CallDescription

__all__ = ["AllReducePlan", "make_plan"]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What the parts of a plan have in common."""

    arena: Arena
    staging: Staging
    call: CallDescription
    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def staged(self, holder: int, parity: int, offset: int = 0) -> torch.Tensor:
        """A tensor like this piece, `offset` bytes into a rank's half."""
        start = self.staging.layout.half(parity) + offset
        return self.staging.buffer.peer(holder, self.shape, self.dtype, start)


AllReducePlan = Callable[[torch.Tensor, torch.Tensor, "float | None"], None]
"""Takes x, out (contiguous, of the planned shape and dtype; may be one tensor) and the timeout in seconds.
**Collective.** Raises what `Channel.begin` and `Channel.await_peers` raise."""


def make_plan(
    algorithm: str,
    arena: Arena,
    call: CallDescription,
    op: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    piece_nbytes: int,
) -> AllReducePlan:
    """Prepare `algorithm` (without its engine) for tensors of `shape` and `dtype`.

    Args:
        algorithm: `one_shot_push`, `one_shot_pull` or `two_shot`.
        arena: of the group, with staging.
        call: what the ranks compare.
        op: `sum`, `avg`, `max` or `min`.
        dtype: element type.
        shape: of x and of out.
        piece_nbytes: bytes to handle at once, at most; 0: as many as fit. The same on every rank.
    """
    staging = arena.staging
    if staging is None:
        raise AssertionError("the arena has no staging")
    layout = staging.layout
    capacity = layout.slot_bytes if algorithm == "one_shot_push" else layout.half_bytes
    numel = torch.Size(shape).numel()
    pieces = cut(numel, dtype.itemsize, min(capacity, piece_nbytes or capacity))
    make = {"one_shot_push": _push, "one_shot_pull": _pull, "two_shot": _two_shot}[algorithm]

    def plan_of(piece_shape: tuple[int, ...]) -> AllReducePlan:
        return make(_Piece(arena, staging, call, op, dtype, piece_shape))

    if len(pieces) == 1:
        return plan_of(tuple(shape))
    plans = {length: plan_of((length,)) for _, length in pieces}
    steps = [(slice(start, start + length), plans[length]) for start, length in pieces]

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        flat_x, flat_out = x.view(-1), out.view(-1)
        for where, plan in steps:
            plan(flat_x[where], flat_out[where], timeout)

    return run


def _pull(piece: _Piece) -> AllReducePlan:
    """Stage x at home; reduce what all ranks staged."""
    channel, rank, world = piece.arena.channel, piece.arena.rank, piece.arena.world_size
    signature = piece.call.signature
    staged = tuple(tuple(piece.staged(peer, parity) for peer in range(world)) for parity in (0, 1))
    reduce = make_reduction(piece.op, piece.dtype, world, piece.numel)
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    call, nbytes = piece.call, piece.numel * piece.dtype.itemsize
    addresses = tuple(staged[parity][rank].data_ptr() for parity in (0, 1))
    is_short = nbytes <= SHORT_BYTES

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        sources = staged[epoch & 1]
        if is_short:
            memcpy(addresses[epoch & 1], x.data_ptr(), nbytes)
        else:
            sources[rank].copy_(x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        reduce(sources, out)
        finish(epoch)

    return run


def _push(piece: _Piece) -> AllReducePlan:
    """Write x into this rank's slot of every rank; reduce this rank's own slots."""
    channel, rank, world = piece.arena.channel, piece.arena.rank, piece.arena.world_size
    signature = piece.call.signature
    slot = piece.staging.layout.slot_bytes
    outgoing = tuple(
        tuple(piece.staged(peer, parity, rank * slot) for peer in range(world)) for parity in (0, 1)
    )
    incoming = tuple(
        tuple(piece.staged(rank, parity, source * slot) for source in range(world)) for parity in (0, 1)
    )
    reduce = make_reduction(piece.op, piece.dtype, world, piece.numel)

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = channel.begin(piece.call, timeout)
        for slot_of_mine in outgoing[epoch & 1]:
            slot_of_mine.copy_(x)
        word = epoch << 32 | signature
        channel.publish(0, word)
        channel.await_peers(0, word)
        reduce(incoming[epoch & 1], out)
        channel.finish(epoch)

    return run


def _two_shot(piece: _Piece) -> AllReducePlan:
    """Stage the other ranks' slices of x; reduce one's own over all ranks; collect all slices."""
    channel, rank, world = piece.arena.channel, piece.arena.rank, piece.arena.world_size
    signature = piece.call.signature
    length = slice_numel(piece.numel, piece.dtype.itemsize, world)
    bounds = [(min(r * length, piece.numel), min((r + 1) * length, piece.numel)) for r in range(world)]
    sizes = [stop - start for start, stop in bounds]
    start, stop = bounds[rank]
    staged = [[piece.staged(peer, parity).view(-1) for peer in range(world)] for parity in (0, 1)]
    own_slices = [[tensor[start:stop] for tensor in staged[parity]] for parity in (0, 1)]
    others = [r for r in range(world) if r != rank and sizes[r]]
    results = [[staged[parity][r][slice(*bounds[r])] for r in range(world)] for parity in (0, 1)]
    reduce = make_reduction(piece.op, piece.dtype, world, stop - start)

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = channel.begin(piece.call, timeout)
        parity = epoch & 1
        parts = x.view(-1).split(sizes)
        mine = staged[parity][rank]
        for peer in others:
            mine[slice(*bounds[peer])].copy_(parts[peer])
        word = epoch << 32 | signature
        channel.publish(0, word)
        channel.await_peers(0, word)
        if sizes[rank]:
            # Nobody reads this rank's slice of its own staging before phase 1: the result goes there.
            sources = own_slices[parity].copy()
            sources[rank] = parts[rank]
            reduce(sources, results[parity][rank])
        channel.publish(1, word)
        channel.await_peers(1, word)
        for result, part in zip(results[parity], out.view(-1).split(sizes), strict=True):
            part.copy_(result)
        channel.finish(epoch)

    return run
