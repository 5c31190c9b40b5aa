"""A symmetric buffer of NVSHMEM: a part of it for every rank, some of which only puts and gets reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.errors import CapabilityError, GroupClosedError
from tcomm.memory.base import SymmetricBuffer

__all__ = ["NvshmemBuffer"]


class NvshmemBuffer(SymmetricBuffer):
    """A buffer of every rank, some of which only puts and gets reach.

    Attributes:
        address: of this rank's buffer: the symmetric address that puts and gets take for any rank.
        table: [W] int64, on the device; 0 for ranks that loads and stores do not reach.
        unreachable: rank -> why.
        multicast: 0: there is no such address.
    """

    multicast = 0

    def __init__(
        self, rank: int, address: int, views: Sequence[torch.Tensor | None], addresses: Sequence[int]
    ) -> None:
        local = views[rank]
        if local is None:
            raise AssertionError("a rank reaches its own memory")
        self.rank = rank
        self.world_size = len(views)
        self.nbytes = local.numel()
        self.address = address
        self.table = torch.tensor(addresses, dtype=torch.int64, device=local.device)
        self.unreachable = {
            peer: f"loads and stores from rank {rank} do not reach rank {peer}: it is on another node, or "
            "its GPU is no peer of this one; use puts and gets"
            for peer, view in enumerate(views)
            if view is None
        }
        self._views: tuple[torch.Tensor | None, ...] = tuple(views)
        self._parts: list[NvshmemBuffer] = []

    @property
    def local(self) -> torch.Tensor:
        """[nbytes] uint8, this rank's own buffer."""
        return self.peer(self.rank)

    def peer(
        self,
        rank: int,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.uint8,
        offset: int = 0,
    ) -> torch.Tensor:
        """A tensor over another rank's buffer, without a copy.

        Raises:
            CapabilityError: when loads and stores do not reach it.
            GroupClosedError: after the transport was closed.
            IndexError: when the view would pass the end of the buffer.
        """
        if not self._views:
            raise GroupClosedError("the memory of NVSHMEM was freed when its transport was closed")
        if rank in self.unreachable:
            raise CapabilityError(self.unreachable[rank])
        return _peer_view(self._views[rank], shape, dtype, offset)

    def part(self, start: int, nbytes: int) -> NvshmemBuffer:
        """The same range of every rank's buffer; lives as long as the whole."""
        views = [None if view is None else view[start : start + nbytes] for view in self._views]
        addresses = [address + start if address else 0 for address in self.table.tolist()]
        self._parts.append(NvshmemBuffer(self.rank, self.address + start, views, addresses))
        return self._parts[-1]

    def forget(self) -> None:
        """Let go of all views; the memory is about to be freed."""
        for part in self._parts:
            part.forget()
        self._views = ()
        self.table.zero_()


def _peer_view(
    buffer: torch.Tensor | None, shape: Sequence[int] | None, dtype: torch.dtype, offset: int
) -> torch.Tensor:
    if buffer is None:
        raise AssertionError("unreachable ranks are refused before")
    return SymmetricBuffer(0, [buffer]).peer(0, shape, dtype, offset)
