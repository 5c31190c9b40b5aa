"""Copies between a tensor and staging, prepared once and done at every call."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Sequence

import torch

from tcomm.memory.base import Staging

__all__ = ["SHORT_BYTES", "Copies", "Part", "Place", "has_threads_for", "make_move", "make_stage", "memcpy"]

SHORT_BYTES = 32 * 1024
"""A shorter copy takes less than giving the GIL up and taking it back may."""

_THREADED_BYTES = 1 << 20

_Memcpy = Callable[[int, int, int], object]
"""Takes addresses of destination and source, and bytes."""

_Copy = Callable[[torch.Tensor], object]

Part = tuple[_Memcpy, int, int, int]
"""How it is copied, its address in symmetric memory, where it begins in the caller's tensor, and bytes."""

# PYFUNCTYPE keeps the GIL, CFUNCTYPE gives it up: no other thread may have to wait for a long copy.
_TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
memcpy = ctypes.PYFUNCTYPE(*_TYPES)(("memcpy", ctypes.PyDLL(None)))
_long_memcpy = ctypes.CFUNCTYPE(*_TYPES)(("memcpy", ctypes.CDLL(None)))


def has_threads_for(nbytes: int, world_size: int) -> bool:
    """Whether torch has threads for so many bytes, and every rank cores for them: else they only cost.

    Args:
        nbytes: to copy, or of each operand.
        world_size: ranks that do the same meanwhile.
    """
    cores = len(os.sched_getaffinity(0)) // world_size
    return nbytes >= _THREADED_BYTES and min(torch.get_num_threads(), cores) > 1


def _copy_in_threads(destination: int, source: int, nbytes: int) -> None:
    """Between addresses, by torch."""
    to, given = (_memory(address, nbytes) for address in (destination, source))
    to.copy_(given)


def _memory(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


def make_move(nbytes: int, world_size: int) -> _Memcpy:
    """The best way to copy so many bytes at once, where `world_size` ranks do so.

    Source and destination may not overlap.
    """
    if nbytes <= SHORT_BYTES:
        return memcpy
    return _copy_in_threads if has_threads_for(nbytes, world_size) else _long_memcpy


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part lies in staging, and where in the caller's tensor. Bytes."""

    holder: int
    """Rank whose staging it is."""
    offset: int
    """From the beginning of a half."""
    first: int
    """From the beginning of the caller's tensor."""
    nbytes: int
    """Length, in both."""


class Copies:
    """Copies between one tensor and staging, for one parity.

    Args:
        staging: of all ranks.
        parity: of the calls that it is for.
        places: what is copied; empty parts are left out.

    Attributes:
        stage: copies from contiguous x to staging.
        fetch: copies from staging to contiguous out.
    """

    def __init__(self, staging: Staging, parity: int, places: Sequence[Place]) -> None:
        half = staging.layout.half(parity)
        places = [place for place in places if place.nbytes]
        tensors = [staging.buffer.peer(p.holder, (p.nbytes,), torch.uint8, half + p.offset) for p in places]
        world_size = staging.layout.world_size
        parts = self._parts = tuple(
            (make_move(place.nbytes, world_size), tensor.data_ptr(), place.first, place.nbytes)
            for tensor, place in zip(tensors, places, strict=True)
        )
        # Not methods: an object that holds its own would keep the memory until the next garbage collection.
        self.stage: _Copy = make_stage(parts, tensors)
        self.fetch: _Copy = _make_fetch(parts, tensors)


def make_stage(parts: Sequence[Part], views: Sequence[torch.Tensor]) -> _Copy:
    """`Copies.stage`; views keep the memory alive that is reached by its address."""
    if _are_short(parts):
        return _make_short(parts, views, is_fetch=False)

    def stage(x: torch.Tensor, _views: object = views) -> None:
        start = x.data_ptr()
        for move, address, first, nbytes in parts:
            move(address, start + first, nbytes)

    return stage


def _make_fetch(parts: Sequence[Part], views: Sequence[torch.Tensor]) -> _Copy:
    """`Copies.fetch`; views as for `make_stage`."""
    if _are_short(parts):
        return _make_short(parts, views, is_fetch=True)

    def fetch(out: torch.Tensor, _views: object = views) -> None:
        start = out.data_ptr()
        for move, address, first, nbytes in parts:
            move(start + first, address, nbytes)

    return fetch


def _are_short(parts: Sequence[Part]) -> bool:
    return all(nbytes <= SHORT_BYTES for *_, nbytes in parts)


def _make_short(parts: Sequence[Part], views: Sequence[torch.Tensor], *, is_fetch: bool) -> _Copy:
    """The hot path, by memoryviews: they copy in an eighth of the time that a call of memcpy takes.

    They keep nothing alive. Those of the caller's tensor are used again while one lies at the same address.
    """
    staged = [_bytes_at(address, nbytes) for _, address, _, nbytes in parts]
    # In one name, for a signal may come between any two.
    last: tuple[int, Sequence[tuple[memoryview, memoryview]]] = (-1, ())

    def copy(tensor: torch.Tensor, _views: object = views) -> None:
        nonlocal last
        at, pairs = last
        start = tensor.data_ptr()
        if start != at:
            given = [_bytes_at(start + first, nbytes) for _, _, first, nbytes in parts]
            pairs = tuple(zip(given, staged, strict=True) if is_fetch else zip(staged, given, strict=True))
            last = start, pairs
        for target, source in pairs:
            target[:] = source

    return copy


def _bytes_at(address: int, nbytes: int) -> memoryview:
    """That memory, which somebody else keeps."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
