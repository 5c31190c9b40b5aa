"""Reducing the ranks' values in rank order on a CPU: the kernels' bits, at memory speed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from tcomm.algorithms import acc_dtype, combine_of
from tcomm.memory.base import Staging

__all__ = ["Own", "Reduce", "Reduction", "room_of"]

Reduce = Callable[[torch.Tensor, torch.Tensor], object]
"""Takes the caller's x and out, both contiguous; which of them it looks at was said when it was prepared."""

Own = tuple[int, int]
"""A rank whose values are read from x at every call, and where in x they begin, in elements."""

_Chunk = Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor], object]
"""Reduces a chunk: takes each rank's, room for what is not finished yet, and where the result goes."""

_Prepared = tuple[tuple[torch.Tensor, ...], torch.Tensor]
"""A chunk of each rank's, and its room."""

_Take = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""The chunks of a tensor that a call is given."""

_CHUNK_BYTES = 128 * 1024

_rooms: weakref.WeakKeyDictionary[Staging, torch.Tensor] = weakref.WeakKeyDictionary()


def room_of(staging: Staging) -> torch.Tensor:
    """[chunk] uint8 for what is not finished yet: one for all plans, as a group makes its calls in turn."""
    room = _rooms.get(staging)
    if room is None:
        room = _rooms[staging] = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu")
    return room


class Reduction:
    """The fastest way to reduce tensors of `numel` elements with the bits that the kernels give.

    fp16 and bf16 are summed in fp32 and rounded once. Two ranks need no accumulator: torch itself adds two
    16-bit values in fp32 and rounds once. Long tensors go in chunks that stay in a core's cache. All views
    that can be known are made once: where ranks share a core, each call of torch finds the caches cold.

    The destination may be any of the sources.

    Args:
        op: `sum`, `avg`, `max` or `min`.
        dtype: element type.
        world_size: number of tensors.
        numel: elements of each.
        room: of `room_of`.
    """

    def __init__(self, op: str, dtype: torch.dtype, world_size: int, numel: int, room: torch.Tensor) -> None:
        wide = acc_dtype(dtype) if op in {"sum", "avg"} else dtype
        is_pair = world_size == 2 and op != "avg"
        at_once = world_size == 1 or is_pair
        step = max(numel, 1) if at_once else _CHUNK_BYTES // wide.itemsize
        self._numel = numel
        self._ranges = tuple(slice(at, min(at + step, numel)) for at in range(0, max(numel, 1), step))
        room_numel = 0 if at_once else min(numel, step)
        self._room = room.view(wide)[:room_numel]
        self._pair = combine_of(op) if is_pair else None
        if at_once:
            self._reduce_chunk = _make_simple(op, world_size)
        else:
            self._reduce_chunk = (_make_widening if wide != dtype else _make_chain)(op, world_size)

    def over(
        self,
        sources: Sequence[torch.Tensor],
        own: Own | None = None,
        result: torch.Tensor | int | None = None,
    ) -> Reduce:
        """Prepare for the memory that it is for.

        Args:
            sources: one tensor per rank, in rank order, contiguous and of one shape.
            own: what is read from x instead of its tensor among `sources`; these are flat then.
            result: where the result goes: a tensor like a source, or the first of `numel` elements of out
                that takes it from flat sources; None: out is like a source.
        """
        chunks = list(
            zip(zip(*map(self._pieces, sources), strict=True), self._rooms(sources[0]), strict=True)
        )
        if own is None and len(chunks) == 1 and not isinstance(result, torch.Tensor):
            reduce = self._over_whole(*chunks[0])
            return reduce if result is None else _into_flat(reduce, result, self._numel)
        take_results = self._make_take(result)
        if own is None:
            return _over_prepared(self._reduce_chunk, chunks, take_results)
        rank, first = own
        return _over_own(self._reduce_chunk, chunks, rank, self._make_take(first), take_results)

    def _over_whole(self, parts: tuple[torch.Tensor, ...], room: torch.Tensor) -> Reduce:
        """Reduces a short message as it is: the hot path, where every line is a tenth of a microsecond."""
        reduce_chunk, pair = self._reduce_chunk, self._pair
        if pair is None:
            return lambda _x, out: reduce_chunk(parts, room, out)
        first, second = parts
        return lambda _x, out: pair(first, second, out=out)

    def _rooms(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Room for every chunk: the same memory, as long as the chunk."""
        if len(self._ranges) == 1:
            return [self._room.view(like.shape) if self._room.numel() == like.numel() else self._room]
        return [self._room[: piece.stop - piece.start] for piece in self._ranges]

    def _pieces(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """A tensor's chunks."""
        if len(self._ranges) == 1:
            return (tensor,)
        flat = tensor.view(-1)
        return [flat[piece] for piece in self._ranges]

    def _make_take(self, place: torch.Tensor | int | None) -> _Take:
        """How to get the chunks of what a call is given; those of a tensor known now are ready."""
        if isinstance(place, torch.Tensor):
            ready = self._pieces(place)
            return lambda _tensor: ready
        if place is None:
            return self._pieces
        numel, is_one = self._numel, len(self._ranges) == 1
        ranges = tuple(slice(place + piece.start, place + piece.stop) for piece in self._ranges)

        def take(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
            flat = tensor if tensor.dim() == 1 else tensor.view(-1)
            if is_one and tensor.numel() == numel:
                return (flat,)
            return [flat[piece] for piece in ranges]

        return take


def _into_flat(reduce: Reduce, first: int, numel: int) -> Reduce:
    """`reduce`, whose result goes to so many elements of out from the first on, whatever shape out has."""
    place = slice(first, first + numel)

    def reduce_into(x: torch.Tensor, out: torch.Tensor) -> None:
        flat = out if out.dim() == 1 else out.view(-1)
        reduce(x, flat if flat.numel() == numel else flat[place])

    return reduce_into


def _over_prepared(reduce_chunk: _Chunk, chunks: Sequence[_Prepared], take_results: _Take) -> Reduce:
    """Reduces what lies in staging, all of it."""

    def reduce(_x: torch.Tensor, out: torch.Tensor) -> None:
        for (parts, room), piece in zip(chunks, take_results(out), strict=True):
            reduce_chunk(parts, room, piece)

    return reduce


def _over_own(
    reduce_chunk: _Chunk, chunks: Sequence[_Prepared], rank: int, take_own: _Take, take_results: _Take
) -> Reduce:
    """Reduces what lies in staging, but for what is this rank's."""
    around = [(parts[:rank], parts[rank + 1 :], room) for parts, room in chunks]

    def reduce(x: torch.Tensor, out: torch.Tensor) -> None:
        pieces = zip(around, take_own(x), take_results(out), strict=True)
        for (before, after, room), mine, piece in pieces:
            reduce_chunk((*before, mine, *after), room, piece)

    return reduce


def _make_simple(op: str, world_size: int) -> _Chunk:
    """Of one rank, or two without an average."""
    if world_size == 1:
        return lambda parts, _room, out: out.copy_(parts[0])
    combine = combine_of(op)
    return lambda parts, _room, out: combine(*parts, out=out)


def _make_chain(op: str, world_size: int) -> _Chunk:
    """One after another; the last step writes the result."""
    combine = combine_of(op)

    def reduce_chunk(parts: Sequence[torch.Tensor], room: torch.Tensor, out: torch.Tensor) -> None:
        acc = parts[0]
        for part in parts[1:-1]:
            combine(acc, part, out=room)
            acc = room
        combine(acc, parts[-1], out=out)

    def average_chunk(parts: Sequence[torch.Tensor], room: torch.Tensor, out: torch.Tensor) -> None:
        reduce_chunk(parts, room, room)
        torch.mul(room, 1.0 / world_size, out=out)

    return average_chunk if op == "avg" else reduce_chunk


def _make_widening(op: str, world_size: int) -> _Chunk:
    """In fp32, rounded once."""

    def reduce_chunk(parts: Sequence[torch.Tensor], room: torch.Tensor, out: torch.Tensor) -> None:
        room.copy_(parts[0])
        for part in parts[1:]:
            room.add_(part)
        if op == "avg":
            room.mul_(1.0 / world_size)
        out.copy_(room)

    return reduce_chunk
