"""All-reduce into symmetric memory on a CPU: results go straight to where every rank wants them.

`docs/memory-model.md` is the contract ("Into symmetric memory").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from tcomm.cpu.all_reduce import AllReducePlan
from tcomm.cpu.copies import Part, make_move, make_stage
from tcomm.cpu.reduction import Reduce, Reduction, room_of
from tcomm.cpu.versions import increment_versions
from tcomm.memory.arena import Arena
from tcomm.memory.layout import slice_numel
from tcomm.memory.regions import Place
from tcomm.signature import CallDescription

__all__ = ["make_direct_plan"]

_CHUNK_NUMEL = 32 * 1024
"""What is reduced is still in the cache when it is copied."""

_Step = tuple[Reduce, list[tuple[Callable[..., object], int, int, int]]]
"""Reduces a chunk at home; how it is copied, addresses at the peers and at home, and bytes."""


def make_direct_plan(
    arena: Arena, call: CallDescription, op: str, dtype: torch.dtype, numel: int, place: Place
) -> AllReducePlan:
    """Prepare `two_shot_direct` for results at `place`.

    x is put in the own result, unless it is that, but for the slice that this rank reduces; when all have
    done so, each reduces its slice of all results and writes it back to all of them. Nothing is staged.

    Args:
        arena: of the group, with staging, of which it takes the room for what is not finished.
        call: what the ranks compare; names the place.
        op: `sum`, `avg`, `max` or `min`.
        dtype: element type.
        numel: elements of x and of out, at least one.
        place: where out begins, on every rank.
    """
    channel, signature = arena.channel, call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    results = _Results(arena, op, dtype, numel, place)
    address = results.own.data_ptr()
    stage = make_stage(results.others(), [results.own])
    # Made when it is first needed: whoever reduces in place does nothing else.
    steps: dict[bool, list[_Step]] = {}

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        if out.data_ptr() != address:
            raise AssertionError("the result is not where the ranks agreed that it is")
        is_in_place = x.data_ptr() == address
        if is_in_place not in steps:
            steps[is_in_place] = results.steps(is_in_place)
        epoch = begin(call, timeout)
        if not is_in_place:
            stage(x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        for reduce, copies in steps[is_in_place]:
            reduce(x, out)
            for move, there, here, nbytes in copies:
                move(there, here, nbytes)
        publish(1, word)
        await_peers(1, word)
        increment_versions((out,))
        finish(epoch)

    return run


class _Results:
    """All ranks' results, and the slice of them that this rank reduces.

    Attributes:
        own: [numel], this rank's.
    """

    def __init__(self, arena: Arena, op: str, dtype: torch.dtype, numel: int, place: Place) -> None:
        if arena.staging is None:
            raise AssertionError("the arena has no staging")
        self._op, self._dtype = op, dtype
        self._world, self._rank = arena.world_size, arena.rank
        self._room = room_of(arena.staging)
        self._flats = [place.buffer.peer(rank, (numel,), dtype, place.offset) for rank in range(self._world)]
        self.own = self._flats[self._rank]
        length = slice_numel(numel, dtype.itemsize, self._world)
        self._start = min(self._rank * length, numel)
        self._stop = min(self._start + length, numel)

    def others(self) -> list[Part]:
        """What the peers need of x: all in front of this rank's slice, and all behind it."""
        size, base = self._dtype.itemsize, self.own.data_ptr()
        bounds = [(0, self._start), (self._stop, len(self.own))]
        parts = [(first * size, (last - first) * size) for first, last in bounds]
        return [(make_move(nbytes, self._world), base + first, first, nbytes) for first, nbytes in parts]

    def steps(self, is_in_place: bool) -> list[_Step]:
        """For each chunk of this rank's slice: how it is reduced, and where it goes then."""
        ends = [*range(self._start, self._stop, _CHUNK_NUMEL), self._stop]
        return [self._step(first, last, is_in_place) for first, last in itertools.pairwise(ends)]

    def _step(self, first: int, last: int, is_in_place: bool) -> _Step:
        chunks = [flat[first:last] for flat in self._flats]
        mine = chunks[self._rank]
        reduction = Reduction(self._op, self._dtype, self._world, last - first, self._room)
        reduce = reduction.over(chunks, None if is_in_place else (self._rank, first), mine)
        # Each begins with another peer, or all would write to the same one.
        peers = [(self._rank + step) % self._world for step in range(1, self._world)]
        nbytes = len(mine) * self._dtype.itemsize
        move = make_move(nbytes, self._world)
        return reduce, [(move, chunks[peer].data_ptr(), mine.data_ptr(), nbytes) for peer in peers]
