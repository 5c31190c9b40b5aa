"""The three contracts of symmetric memory: how ranks exchange bytes, what they get, who makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

__all__ = ["Exchange", "NotShared", "SymmetricBuffer", "Transport"]


class Exchange(Protocol):
    """How the ranks of a group trade a few bytes while they set things up."""

    rank: int
    """This process, within the group."""
    world_size: int
    """Number of ranks in the group."""

    def all_gather(
        self, payload: bytes, timeout: float, check: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Return every rank's payload, in rank order. **Collective.**

        Args:
            payload: what this rank gives, a few KiB at most.
            timeout: seconds.
            check: called now and then while waiting; what it raises ends the wait.

        Raises:
            RendezvousError: when some ranks did not come in time; names them.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NotShared:
    """Why the ranks of a group cannot have symmetric memory. Every rank gets the same one."""

    reason: str
    """A sentence for the log and for `explain`."""


class SymmetricBuffer:
    """One buffer of equal size per rank, all of them addressable here.

    Attributes:
        rank: this process, within the group.
        world_size: number of ranks.
        nbytes: size of each rank's buffer, in bytes.
        table: [W] int64, base address of each rank's buffer as seen by this process. Kernels take it.
    """

    def __init__(self, rank: int, buffers: Sequence[torch.Tensor]) -> None:
        self.rank = rank
        self.world_size = len(buffers)
        self.nbytes = buffers[0].numel()
        self._buffers = tuple(buffers)
        self.table = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64)

    @property
    def local(self) -> torch.Tensor:
        """[nbytes] uint8, this rank's own buffer."""
        return self._buffers[self.rank]

    def peer(
        self,
        rank: int,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.uint8,
        offset: int = 0,
    ) -> torch.Tensor:
        """A tensor over another rank's buffer, without a copy.

        Args:
            rank: whose buffer; may be this rank.
            shape: of the tensor; all that follows `offset` where None.
            dtype: of the tensor.
            offset: where it begins, in bytes, a multiple of the element size.

        Raises:
            IndexError: when the view would pass the end of the buffer.
        """
        flat = self._buffers[rank][offset:].view(dtype)
        if shape is None:
            return flat
        numel = 1
        for length in shape:
            numel *= length
        if offset < 0 or numel > flat.numel():
            wanted = numel * dtype.itemsize
            raise IndexError(f"{wanted} bytes at offset {offset} pass the end of a buffer of {self.nbytes}")
        return flat[:numel].view(tuple(shape))


class Transport(Protocol):
    """Makes symmetric buffers for one group."""

    name: str
    """As it appears in `explain` and in logs."""

    def allocate(self, nbytes: int, timeout: float) -> SymmetricBuffer | NotShared:
        """Make a zeroed buffer of `nbytes` on every rank and map all of them. **Collective.**

        Raises:
            CapabilityError: on every rank, when one of them lacks the room; says needed and available.
            RendezvousError: when a rank did not come in time.
        """
        ...
