"""Symmetric memory that callers hold tensors over, and how ranks name a place in it."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch

from tcomm.memory.base import SymmetricBuffer

__all__ = ["Place", "Regions"]

_MAX_NAMES = 1024


class Place(NamedTuple):
    """Where a tensor begins."""

    buffer: SymmetricBuffer
    """Of all ranks."""
    offset: int
    """Bytes into each rank's buffer."""


class Regions:
    """A group's regions, by the call in which the ranks made them.

    Their addresses never change, and they stay until the group is closed, whoever drops the tensors.

    Attributes:
        is_empty: whether there are none; every call asks.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, SymmetricBuffer] = {}
        self._starts: list[tuple[int, int]] = []
        self._names: dict[int, str] = {}
        self._places: dict[str, Place] = {}
        self.is_empty = True

    def add(self, buffer: SymmetricBuffer, call: int) -> None:
        """Take a region in that the ranks made in that call, of which each has one."""
        self._buffers[call] = buffer
        self.is_empty = False
        self._starts = sorted((b.local.data_ptr(), made) for made, b in self._buffers.items())
        self._names.clear()

    def name(self, tensor: torch.Tensor) -> str:
        """What ranks call the place where a tensor begins; empty where that is in no region."""
        address = tensor.data_ptr()
        name = self._names.get(address)
        if name is None:
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
                self._places.clear()
            name = self._names[address] = self._make_name(address)
        return name

    def find_name(self, out: torch.Tensor | None) -> str:
        """As `name`, of a result that may have to be made yet."""
        return "" if self.is_empty or out is None else self.name(out)

    def _make_name(self, address: int) -> str:
        at = bisect.bisect(self._starts, address, key=lambda start: start[0]) - 1
        if at < 0:
            return ""
        start, made = self._starts[at]
        buffer, offset = self._buffers[made], address - start
        if offset >= buffer.nbytes:
            return ""
        name = f"symmetric tensor of call #{made} from byte {offset} on"
        self._places[name] = Place(buffer, offset)
        return name

    def find(self, name: str) -> Place | None:
        """The place of a name that `name` gave last; None for every other text."""
        return self._places.get(name)

    def clear(self) -> None:
        """Give the memory back that no tensor holds."""
        for kept in (self._buffers, self._starts, self._names, self._places):
            kept.clear()
        self.is_empty = True
