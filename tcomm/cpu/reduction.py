"""Reducing the ranks' values in rank order on a CPU: the kernels' bits, at memory speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tcomm.algorithms import acc_dtype, combine_of
from tcomm.cpu.copies import SHORT_BYTES, has_threads_for

__all__ = ["Own", "Reduce", "Reduction"]

Reduce = Callable[[torch.Tensor, torch.Tensor], object]
"""Takes the caller's x and out, both contiguous; which of them it looks at was said when it was prepared."""

Own = tuple[int, int]
"""A rank whose values are read from x at every call, and where in x they begin, in elements."""

_Numbers = Any
"""A tensor, or a numpy array over a tensor's memory."""

_Chunk = Callable[[Sequence[_Numbers], _Numbers, _Numbers], object]
"""Reduces a chunk: takes each rank's, room for what is not finished yet, and where the result goes."""

_Prepared = tuple[tuple[_Numbers, ...], _Numbers]
"""A chunk of each rank's, and its room."""

_Take = Callable[[torch.Tensor], Sequence[_Numbers]]
"""The chunks of a tensor that a call is given."""

_CHUNK_BYTES = 128 * 1024
_ALONE_BYTES = 256 * 1024
_STREAMED_BYTES = 1 << 20
_VECTOR_BYTES = 64


class Reduction:
    """The fastest way to reduce tensors of `numel` elements with the bits that the kernels give.

    fp16 and bf16 are summed in fp32 and rounded once. Two ranks need no accumulator: torch itself adds two
    16-bit values in fp32 and rounds once. Long tensors go in chunks that stay in a core's cache. Long sums
    are numpy's: where ranks share a core, each call finds the caches cold, and torch's touches more of them.

    The destination may be any of the sources.

    Args:
        op: `sum`, `avg`, `max` or `min`.
        dtype: element type.
        world_size: number of tensors.
        numel: elements of each.
    """

    def __init__(self, op: str, dtype: torch.dtype, world_size: int, numel: int) -> None:
        wide = acc_dtype(dtype) if op in {"sum", "avg"} else dtype
        at_once = world_size == 1 or (world_size == 2 and op != "avg")
        step = max(numel, 1) if at_once else _CHUNK_BYTES // wide.itemsize
        self._pair = combine_of(op) if at_once and world_size == 2 else None
        self._numel = numel
        self._ranges = tuple(slice(at, min(at + step, numel)) for at in range(0, max(numel, 1), step))
        self._room = None if at_once else torch.empty(min(numel, step), dtype=wide, device="cpu")
        self._in_arrays = _is_for_arrays(op, dtype, world_size, numel)
        self._reduce_chunk: _Chunk
        if at_once:
            self._reduce_chunk = _make_simple(op, world_size, self._in_arrays)
        elif wide != dtype:
            self._reduce_chunk = _make_widening(op, world_size)
        else:
            self._reduce_chunk = _make_chain(op, dtype, world_size, self._in_arrays)

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
        rooms = self._rooms(sources[0])
        chunks = list(zip(zip(*map(self._pieces, sources), strict=True), rooms, strict=True))
        if own is None and result is None and len(chunks) == 1 and not self._in_arrays:
            return self._over_whole(*chunks[0])
        take_results = self._make_take(result)
        if own is None:
            run = _over_prepared(self._reduce_chunk, chunks, take_results)
        else:
            rank, first = own
            run = _over_own(self._reduce_chunk, chunks, rank, self._make_take(first), take_results)
        return _quietly(run) if self._in_arrays else run

    def _over_whole(self, parts: tuple[torch.Tensor, ...], room: torch.Tensor | None) -> Reduce:
        """Reduces a short message as it is: the hot path, where every line is a tenth of a microsecond."""
        reduce_chunk, pair = self._reduce_chunk, self._pair
        if pair is None:
            return lambda _x, out: reduce_chunk(parts, room, out)
        first, second = parts
        return lambda _x, out: pair(first, second, out=out)

    def _rooms(self, like: torch.Tensor) -> list[_Numbers]:
        """Room for every chunk: the same memory, as long as the chunk."""
        if self._room is None:
            return [None]
        if len(self._ranges) == 1:
            return [self._numbers(self._room.view(like.shape))]
        room = self._numbers(self._room)
        return [room[: piece.stop - piece.start] for piece in self._ranges]

    def _numbers(self, tensor: torch.Tensor) -> _Numbers:
        return tensor.numpy() if self._in_arrays else tensor

    def _pieces(self, tensor: torch.Tensor) -> Sequence[_Numbers]:
        """A tensor's chunks."""
        numbers = self._numbers(tensor)
        if len(self._ranges) == 1:
            return (numbers,)
        flat = numbers.reshape(-1)
        return [flat[piece] for piece in self._ranges]

    def _make_take(self, place: torch.Tensor | int | None) -> _Take:
        """How to get the chunks of what a call is given; those of a tensor known now are ready."""
        if isinstance(place, torch.Tensor):
            ready = self._pieces(place)
            return lambda _tensor: ready
        if place is None:
            return self._pieces
        numel, in_arrays, is_one = self._numel, self._in_arrays, len(self._ranges) == 1
        ranges = tuple(slice(place + piece.start, place + piece.stop) for piece in self._ranges)

        def take(tensor: torch.Tensor) -> Sequence[_Numbers]:
            numbers: _Numbers = tensor.numpy() if in_arrays else tensor
            flat = numbers if tensor.dim() == 1 else numbers.reshape(-1)
            if is_one and tensor.numel() == numel:
                return (flat,)
            return [flat[piece] for piece in ranges]

        return take


def _over_prepared(reduce_chunk: _Chunk, chunks: Sequence[_Prepared], take_results: _Take) -> Reduce:
    """Reduces what lies in staging, all of it."""
    if len(chunks) == 1:
        parts, room = chunks[0]
        return lambda _x, out: reduce_chunk(parts, room, take_results(out)[0])

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


def _is_for_arrays(op: str, dtype: torch.dtype, world_size: int, numel: int) -> bool:
    """Whether numpy gives torch's bits, and sooner.

    max and min of NaN, and two NaN added behind the last whole vector, have other bits there.
    """
    nbytes = numel * dtype.itemsize
    is_sum = op in {"sum", "avg"} and acc_dtype(dtype) == dtype
    is_same = is_sum and nbytes % _VECTOR_BYTES == 0 and _adds_like_torch(dtype)
    if world_size > 2 or op == "avg":
        return is_same and world_size > 1 and nbytes > SHORT_BYTES
    if world_size == 1 or not is_same or nbytes <= _ALONE_BYTES:
        return False
    # A single call of torch's is as good from there on, but for threads that get in each other's way.
    return nbytes <= _STREAMED_BYTES or (
        torch.get_num_threads() > 1 and not has_threads_for(nbytes, world_size)
    )


@functools.cache
def _adds_like_torch(dtype: torch.dtype) -> bool:
    """Whether both take the same of two NaN here: that is up to the processor, and to how numpy was built."""
    if not dtype.is_floating_point:
        return True
    first, second, by_numpy = torch.zeros((3, 4 * _VECTOR_BYTES), dtype=dtype, device="cpu")
    first.fill_(float("nan"))
    second.copy_(-first)
    np.add(second.numpy(), first.numpy(), by_numpy.numpy())
    return bool((torch.signbit(first + second) == torch.signbit(by_numpy)).all())


def _quietly(reduce: Reduce) -> Reduce:
    """Without numpy's warnings of infinities and NaN, which are values like any other."""

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        with np.errstate(all="ignore"):
            reduce(x, out)

    return run


def _combine_of(op: str, in_arrays: bool) -> Callable[..., object]:
    """Combines two into `out`. Of two NaN torch takes the second, and numpy mostly the first."""
    if in_arrays:
        return lambda first, second, out: np.add(second, first, out)
    return combine_of(op)


def _make_simple(op: str, world_size: int, in_arrays: bool) -> _Chunk:
    """Of one rank, or two without an average."""
    if world_size == 1:
        return lambda parts, _room, out: out.copy_(parts[0])
    combine = _combine_of(op, in_arrays)
    return lambda parts, _room, out: combine(*parts, out=out)


def _make_chain(op: str, dtype: torch.dtype, world_size: int, in_arrays: bool) -> _Chunk:
    """One after another; the last step writes the result."""
    combine = _combine_of(op, in_arrays)
    if op != "avg":

        def reduce_chunk(parts: Sequence[_Numbers], room: _Numbers, out: _Numbers) -> None:
            acc = parts[0]
            for part in parts[1:-1]:
                combine(acc, part, out=room)
                acc = room
            combine(acc, parts[-1], out=out)

        return reduce_chunk
    multiply = np.multiply if in_arrays else torch.mul
    scale: Any = 1.0 / world_size
    if in_arrays:
        scale = torch.tensor(scale, dtype=dtype, device="cpu").numpy()

    def average_chunk(parts: Sequence[_Numbers], room: _Numbers, out: _Numbers) -> None:
        acc = parts[0]
        for part in parts[1:]:
            combine(acc, part, out=room)
            acc = room
        multiply(room, scale, out=out)

    return average_chunk


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
