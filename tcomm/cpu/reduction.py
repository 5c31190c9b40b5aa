"""Reducing the ranks' values in rank order on a CPU: the kernels' bits, at memory speed."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from tcomm.algorithms import acc_dtype, combine_of
from tcomm.cpu.versions import increment_versions
from tcomm.memory.base import Staging

__all__ = ["Own", "Reduce", "Reduction", "room_of"]

Reduce = Callable[[torch.Tensor, torch.Tensor], object]
"""Takes the caller's x and out, both contiguous; which of them it looks at was said when it was prepared."""

Own = tuple[int, int]
"""A rank whose values are read from x at every call, and where in x they begin, in elements."""

_Numbers = Any
"""A tensor, or a flat array of numpy's over its memory."""

_Chunk = Callable[[Sequence[_Numbers], _Numbers, _Numbers], object]
"""Reduces a chunk: takes each rank's, room for what is not finished yet, and where the result goes."""

_Prepared = tuple[tuple[_Numbers, ...], _Numbers]
"""A chunk of each rank's, and its room."""

_Take = Callable[[torch.Tensor], Sequence[_Numbers]]
"""The chunks of a tensor that a call is given."""

_CHUNK_BYTES = 256 * 1024
_MOST_PAIR_BYTES = 128 * 1024

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
    Values that are not rounded are summed in numpy, whose calls and views cost less, and which adds what
    comes from another core's cache the faster of the two; but torch is sooner done with two ranks' long
    tensors, in one call, from main memory.

    The destination may be any of the sources. Of several NaN, which one a sum keeps is up to torch and numpy,
    and does not depend on where the memory is: it is the same on every rank.

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
        self._op, self._numel, self._dtype = op, numel, dtype
        is_short = numel * dtype.itemsize <= _MOST_PAIR_BYTES
        self._in_arrays = op in {"sum", "avg"} and wide == dtype and (not at_once or (is_pair and is_short))
        self._ranges = tuple(slice(at, min(at + step, numel)) for at in range(0, max(numel, 1), step))
        self._room = room.view(wide)[: 0 if at_once else min(numel, step)]
        self._pair = combine_of(op) if is_pair else None
        if at_once and not self._in_arrays:
            self._reduce_chunk = _make_simple(op, world_size)
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
        if self._in_arrays and own is not None and result is sources[own[0]]:
            # What is not finished grows where the result goes, which nobody reads before it is all there.
            rooms = self._pieces(sources[own[0]])
        else:
            rooms = self._rooms(sources[0])
        chunks = list(zip(zip(*map(self._pieces, sources), strict=True), rooms, strict=True))
        is_whole = own is None and len(chunks) == 1 and not self._in_arrays
        if is_whole and not isinstance(result, torch.Tensor):
            reduce = self._over_whole(*chunks[0])
            return reduce if result is None else _into_flat(reduce, result, self._numel)
        take_results = self._make_take(result)
        if own is None and self._in_arrays and self._op == "sum" and len(chunks) == 1:
            return _over_short(*chunks[0], take_results)
        if own is None:
            reduce = _over_prepared(self._reduce_chunk, chunks, take_results)
        else:
            rank, first = own
            reduce = _over_own(self._reduce_chunk, chunks, rank, self._make_take(first), take_results)
        return _telling_autograd(reduce) if self._in_arrays else reduce

    def _over_whole(self, parts: tuple[torch.Tensor, ...], room: torch.Tensor) -> Reduce:
        """Reduces a short message as it is: the hot path, where every line is a tenth of a microsecond."""
        reduce_chunk, pair = self._reduce_chunk, self._pair
        if pair is None:
            return lambda _x, out: reduce_chunk(parts, room, out)
        first, second = parts
        return lambda _x, out: pair(first, second, out=out)

    def _rooms(self, like: torch.Tensor) -> list[_Numbers]:
        """Room for every chunk: the same memory, as long as the chunk."""
        if len(self._ranges) > 1:
            rooms = [self._room[: piece.stop - piece.start] for piece in self._ranges]
        else:
            rooms = [self._room.view(like.shape) if self._room.numel() == like.numel() else self._room]
        return list(map(_as_array, rooms)) if self._in_arrays else rooms

    def _pieces(self, tensor: torch.Tensor) -> Sequence[_Numbers]:
        """A tensor's chunks."""
        if len(self._ranges) == 1:
            return (_as_array(tensor) if self._in_arrays else tensor,)
        flat = _as_array(tensor) if self._in_arrays else tensor.view(-1)
        return [flat[piece] for piece in self._ranges]

    def _make_take(self, place: torch.Tensor | int | None) -> _Take:
        """How to get the chunks of what a call is given; those of a tensor known now are ready."""
        if isinstance(place, torch.Tensor):
            ready = self._pieces(place)
            return lambda _tensor: ready
        if self._in_arrays:
            return _make_arrays(self._ranges, place or 0, self._numel, self._dtype)
        if place is None and len(self._ranges) == 1:
            return lambda tensor: (tensor,)
        return _make_slices(self._ranges, place or 0, self._numel)


def _as_array(tensor: torch.Tensor) -> _Numbers:
    return tensor.view(-1).numpy()


def _quietly(ufunc: np.ufunc) -> Callable[..., object]:
    """`ufunc` without warnings of infinities and NaN, which are values like any other.

    It runs in a context of its own, in which numpy was told so once: `np.errstate` takes thrice an addition's
    time, and its end can be missed where a signal comes between.
    """
    context = contextvars.Context()
    context.run(np.seterr, all="ignore")
    return functools.partial(context.run, ufunc)


def _telling_autograd(reduce: Reduce) -> Reduce:
    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        reduce(x, out)
        increment_versions((out,))

    return run


def _make_slices(ranges: Sequence[slice], first: int, numel: int) -> _Take:
    """A tensor's ranges, counted from its element `first` on."""
    places = [slice(first + piece.start, first + piece.stop) for piece in ranges]

    def take(tensor: torch.Tensor) -> Sequence[_Numbers]:
        flat = tensor if tensor.dim() == 1 else tensor.view(-1)
        if len(places) == 1 and tensor.numel() == numel:
            return (flat,)
        return [flat[place] for place in places]

    return take


def _make_arrays(ranges: Sequence[slice], first: int, numel: int, dtype: torch.dtype) -> _Take:
    """As `_make_slices`, as arrays: made from the address, which takes a fraction of what torch's views take.

    They keep nothing alive. The last ones stay, and are used again while a tensor lies at their address.
    """
    kind = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    offset, memory = first * dtype.itemsize, cast("Any", ctypes.c_char * (numel * dtype.itemsize))
    if not numel:
        return lambda _tensor: (np.empty(0, kind),)
    # In one name, for a signal may come between any two.
    last: tuple[int, Sequence[_Numbers]] = (-1, ())

    def take(tensor: torch.Tensor) -> Sequence[_Numbers]:
        nonlocal last
        at, arrays = last
        address = tensor.data_ptr()
        if address != at:
            flat = np.frombuffer(memory.from_address(address + offset), kind)
            arrays = (flat,) if len(ranges) == 1 else [flat[piece] for piece in ranges]
            last = address, arrays
        return arrays

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
    if len(chunks) == 1:
        parts, room = chunks[0]
        return lambda _x, out: reduce_chunk(parts, room, take_results(out)[0])

    def reduce(_x: torch.Tensor, out: torch.Tensor) -> None:
        for (parts, room), piece in zip(chunks, take_results(out), strict=True):
            reduce_chunk(parts, room, piece)

    return reduce


def _over_short(parts: Sequence[_Numbers], room: _Numbers, take_results: _Take) -> Reduce:
    """Sums a chunk that lies in staging: the hot path, where every line is a tenth of a microsecond."""
    first, *others, last = parts
    add = _quietly(np.add)

    def reduce(_x: torch.Tensor, out: torch.Tensor) -> None:
        acc = first
        for part in others:
            add(acc, part, room)
            acc = room
        add(acc, last, take_results(out)[0])
        increment_versions((out,))

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


def _make_chain(op: str, dtype: torch.dtype, world_size: int, in_arrays: bool) -> _Chunk:
    """One after another; the last step writes the result."""
    combine = _quietly(np.add) if in_arrays else combine_of(op)

    def reduce_chunk(parts: Sequence[_Numbers], room: _Numbers, out: _Numbers) -> None:
        acc = parts[0]
        for part in parts[1:-1]:
            combine(acc, part, out=room)
            acc = room
        combine(acc, parts[-1], out=out)

    if op != "avg":
        return reduce_chunk
    multiply = _quietly(np.multiply)
    scale = torch.tensor(1.0 / world_size, dtype=dtype, device="cpu").numpy()

    def average_chunk(parts: Sequence[_Numbers], room: _Numbers, out: _Numbers) -> None:
        reduce_chunk(parts, room, room)
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
