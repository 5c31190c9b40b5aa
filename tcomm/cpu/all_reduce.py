"""All-reduce on a CPU: the algorithms of `tcomm.kernels.all_reduce`, prepared once per kind of call.

A plan holds everything that does not change between calls: tensor views of the staging of both parities, the
signature, the reduction. What is left for a call is two copies, one word per peer, and the arithmetic.

Numerics and contract are those of the kernels; the signature names the engine, so a rank that runs a kernel
and a rank that runs a plan disagree rather than mix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from tcomm.cpu.copies import Copies, Place
from tcomm.cpu.reduction import Reduce, Reduction, room_of
from tcomm.cpu.versions import increment_versions
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

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def reduction(self, numel: int) -> Reduction:
        """For so many elements of every rank."""
        return Reduction(self.op, self.dtype, self.arena.world_size, numel, room_of(self.staging))

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
    rank, world = piece.arena.rank, piece.arena.world_size
    return _one_shot(
        piece,
        [Place(rank, 0, 0, piece.nbytes)],
        [[piece.staged(peer, parity) for peer in range(world)] for parity in (0, 1)],
    )


def _push(piece: _Piece) -> AllReducePlan:
    """Write x into this rank's slot of every rank; reduce this rank's own slots."""
    rank, world = piece.arena.rank, piece.arena.world_size
    slot = piece.staging.layout.slot_bytes
    return _one_shot(
        piece,
        [Place(peer, rank * slot, 0, piece.nbytes) for peer in range(world)],
        [[piece.staged(rank, parity, source * slot) for source in range(world)] for parity in (0, 1)],
    )


def _one_shot(
    piece: _Piece, places: Sequence[Place], sources: Sequence[Sequence[torch.Tensor]]
) -> AllReducePlan:
    """Put x in its places; reduce what lies in the sources of the call's parity."""
    channel, call, signature = piece.arena.channel, piece.call, piece.call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    stages = [Copies(piece.staging, parity, places).stage for parity in (0, 1)]
    reduction = piece.reduction(piece.numel)
    reduces = [reduction.over(sources[parity]) for parity in (0, 1)]

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        stages[epoch & 1](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        reduces[epoch & 1](x, out)
        finish(epoch)

    return run


def _two_shot(piece: _Piece) -> AllReducePlan:
    """Stage the other ranks' slices of x; reduce one's own over all ranks; collect all slices."""
    channel, call, signature = piece.arena.channel, piece.call, piece.call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    slices = _Slices(piece)
    stages = [Copies(piece.staging, parity, slices.others()).stage for parity in (0, 1)]
    reduces = [slices.reduce(parity) for parity in (0, 1)]
    fetches = [Copies(piece.staging, parity, slices.results()).fetch for parity in (0, 1)]

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        parity = epoch & 1
        stages[parity](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        reduces[parity](x, out)
        publish(1, word)
        await_peers(1, word)
        fetches[parity](out)
        increment_versions((out,))
        finish(epoch)

    return run


class _Slices:
    """Which slice of a piece each rank reduces, and where it lies: at the same place in all halves."""

    def __init__(self, piece: _Piece) -> None:
        self._piece = piece
        self._world, self._rank = piece.arena.world_size, piece.arena.rank
        length = slice_numel(piece.numel, piece.dtype.itemsize, self._world)
        starts = [min(rank * length, piece.numel) for rank in range(self._world + 1)]
        self._bounds = list(itertools.pairwise(starts))

    def others(self) -> list[Place]:
        """What this rank stages: x up to its own slice, and behind it."""
        start, stop = self._bounds[self._rank]
        return [self._place(self._rank, 0, start), self._place(self._rank, stop, self._piece.numel)]

    def results(self) -> list[Place]:
        """Where all slices of the result are."""
        return [self._place(rank, *bounds) for rank, bounds in enumerate(self._bounds)]

    def _place(self, holder: int, start: int, stop: int) -> Place:
        size = self._piece.dtype.itemsize
        return Place(holder, start * size, start * size, (stop - start) * size)

    def reduce(self, parity: int) -> Reduce:
        """Reduces this rank's slice."""
        start, stop = self._bounds[self._rank]
        # Nobody reads this rank's slice of its own staging before phase 1: the result goes there.
        staged = [self._piece.staged(rank, parity).view(-1)[start:stop] for rank in range(self._world)]
        reduction = self._piece.reduction(stop - start)
        return reduction.over(staged, (self._rank, start), staged[self._rank])
