"""Backends that bring every token to every rank, by plain collectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from tcomm.groups.arguments import Timeout, Unset
from tcomm.groups.communicator import Communicator
from tcomm.groups.moe.layers.contract import Experts, MoeShape

__all__ = ["GatheringLayer", "NaiveLayer"]


class GatheringLayer:
    """Tokens by all-gather, results by reduce-scatter. Works without shared memory too.

    Args:
        shape: of the layers.
        group: of the ranks; None: the default one.
        timeout: of calls.
    """

    def __init__(self, shape: MoeShape, group: dist.ProcessGroup | None, timeout: Timeout | Unset) -> None:
        self._shape = shape
        self._comm = Communicator(group, name="moe gathered", timeout=timeout)
        per_rank = shape.num_experts // self._comm.world_size
        self._first, self._last = self._comm.rank * per_rank, (self._comm.rank + 1) * per_rank
        self._wire_nbytes = 0

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """As `Backend.forward`. **Collective.**"""
        shape, comm = self._shape, self._comm
        sizes = comm.all_gather_single(torch.tensor([len(x)], device="cpu")).tolist()
        *packed, ids, weights = self._gather([*shape.pack(x), topk_idx, topk_weights], sizes)
        mine = (ids >= self._first) & (ids < self._last)
        y = experts.flat(shape.unpack(tuple(packed)), torch.where(mine, ids - self._first, -1), weights)
        # A rank's sum has to count for nothing where it has no expert of the token.
        y = torch.where(mine.any(1, keepdim=True), y, 0).to(shape.dtype)
        return self._scatter(y, sizes)

    def _gather(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        self._count(sum(sizes) - sizes[self._comm.rank], tensors)
        gathered: list[torch.Tensor] = self._comm.all_gatherv([t.contiguous() for t in tensors], sizes)
        return gathered

    def _scatter(self, y: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self._count((self._comm.world_size - 1) * sizes[self._comm.rank], [y])
        result: torch.Tensor = self._comm.reduce_scatterv(y, sizes)
        return result

    def _count(self, num_rows: int, tensors: Sequence[torch.Tensor]) -> None:
        row_nbytes = sum(tensor[:1].numel() * tensor.itemsize if len(tensor) else 0 for tensor in tensors)
        self._wire_nbytes += num_rows * row_nbytes

    @property
    def wire_nbytes(self) -> int:
        """As `Backend.wire_nbytes`: rows of others that this rank gets, and those that are summed for it."""
        return self._wire_nbytes

    def close(self) -> None:
        """As `Backend.close`."""
        self._comm.close()


class NaiveLayer(GatheringLayer):
    """Tokens by a broadcast from each rank, results by an all-reduce of all of them."""

    def _gather(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        self._count(sum(sizes) - sizes[self._comm.rank], tensors)
        return [
            torch.cat([self._from(root, tensor, size) for root, size in enumerate(sizes)])
            for tensor in tensors
        ]

    def _from(self, root: int, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        buffer = (
            tensor.contiguous() if root == self._comm.rank else tensor.new_empty(num_rows, *tensor.shape[1:])
        )
        return self._comm.broadcast(buffer, root)

    def _scatter(self, y: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self._count((self._comm.world_size - 1) * len(y), [y])
        mine: torch.Tensor = self._comm.all_reduce(y).split(list(sizes))[self._comm.rank]
        return mine
