"""Copies between a tensor and staging, prepared once and done at every call."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from tcomm.memory.base import Staging

__all__ = ["SHORT_BYTES", "Copies", "Place", "memcpy"]

SHORT_BYTES = 32 * 1024
"""For a shorter message, torch's dispatch costs three times the copy itself."""

# PYFUNCTYPE keeps the GIL: giving it up and taking it back would cost as much again.
memcpy = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memcpy", ctypes.PyDLL(None))
)


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
    """

    def __init__(self, staging: Staging, parity: int, places: Sequence[Place]) -> None:
        half = staging.layout.half(parity)
        places = [place for place in places if place.nbytes]
        tensors = [staging.buffer.peer(p.holder, (p.nbytes,), torch.uint8, half + p.offset) for p in places]
        self._is_short = sum(place.nbytes for place in places) <= SHORT_BYTES
        self._addresses = tuple(
            (tensor.data_ptr(), place.first, place.nbytes)
            for tensor, place in zip(tensors, places, strict=True)
        )
        self._views = tuple(
            (tensor, slice(place.first, place.first + place.nbytes))
            for tensor, place in zip(tensors, places, strict=True)
        )

    def stage(self, x: torch.Tensor) -> None:
        """Copy from contiguous x to staging."""
        if self._is_short:
            start = x.data_ptr()
            for address, first, nbytes in self._addresses:
                memcpy(address, start + first, nbytes)
        else:
            flat = x.view(-1).view(torch.uint8)
            for staged, where in self._views:
                staged.copy_(flat[where])

    def fetch(self, out: torch.Tensor) -> None:
        """Copy from staging to contiguous out."""
        if self._is_short:
            start = out.data_ptr()
            for address, first, nbytes in self._addresses:
                memcpy(start + first, address, nbytes)
        else:
            flat = out.view(-1).view(torch.uint8)
            for staged, where in self._views:
                flat[where].copy_(staged)
