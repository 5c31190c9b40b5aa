"""Results that reuse memory: a fresh 64 MiB tensor costs more in page faults than the collective."""

from __future__ import annotations

import collections
import mmap
import sys

import torch

__all__ = ["POOLED_BYTES", "ResultPool"]

_CPU = torch.device("cpu")
"""A word would be read at every call."""
POOLED_BYTES = 128 * 1024
"""Smaller results are new tensors."""
_KEPT_PER_KIND = 2
_KEPT_KINDS = 8


def _find_unused(buffers: list[mmap.mmap]) -> mmap.mmap | None:
    """The first buffer that nothing but `buffers` refers to."""
    for buffer in buffers:
        if sys.getrefcount(buffer) <= _UNUSED:
            return buffer
    return None


def _count_unused() -> int:
    """What `_find_unused` counts for a buffer that only a list holds; differs between Pythons."""
    for buffer in [mmap.mmap(-1, 1)]:
        return sys.getrefcount(buffer)
    raise AssertionError


_UNUSED = _count_unused()


class ResultPool:
    """Hands out tensors, and hands their memory out again once nobody holds it.

    Memory counts as free when no tensor over it is left, views included: a tensor made by
    `torch.frombuffer` holds a reference to its buffer for as long as its storage lives. Two buffers of each
    of the last eight shapes and dtypes are kept; whoever needs more at once gets fresh memory.
    """

    def __init__(self) -> None:
        self._buffers: collections.OrderedDict[tuple[torch.Size, torch.dtype], list[mmap.mmap]] = (
            collections.OrderedDict()
        )

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` and `dtype` with arbitrary contents, on the CPU."""
        nbytes = shape.numel() * dtype.itemsize
        if nbytes < POOLED_BYTES:
            return torch.empty(shape, dtype=dtype, device=_CPU)
        key = (shape, dtype)
        buffers = self._buffers.setdefault(key, [])
        self._buffers.move_to_end(key)
        buffer = _find_unused(buffers)
        if buffer is not None:
            return torch.frombuffer(buffer, dtype=dtype).view(shape)
        # The default is MAP_SHARED: a forked child would see this memory change under its hands.
        buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if len(buffers) < _KEPT_PER_KIND:
            buffers.append(buffer)
        if len(self._buffers) > _KEPT_KINDS:
            self._buffers.popitem(last=False)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)
