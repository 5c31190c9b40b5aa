"""Backends that bring each token once to each rank that has an expert of it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tcomm.groups.arguments import Timeout, Unset
from tcomm.groups.moe.gradients import combine_tokens, dispatch_tokens
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.layers.contract import Experts, MoeShape, OverExchange
from tcomm.groups.moe.one_sided import OneSided
from tcomm.groups.moe.two_sided import TwoSided
from tcomm.groups.setup import from_process_group

__all__ = ["HighThroughputLayer", "OneSidedLayer", "TwoSidedLayer"]

_META_NBYTES = 12
"""An expert's id in a buffer, and its weight."""
_FIFO_NBYTES = 8 << 20


class HighThroughputLayer(OverExchange[HighThroughput]):
    """Tokens by `HighThroughput`; gradients go back through it, unless they travel as fp8.

    Args:
        shape: of the layers.
        group: of the ranks; None: the default one.
        timeout: of calls.
    """

    def __init__(self, shape: MoeShape, group: dist.ProcessGroup | None, timeout: Timeout | Unset) -> None:
        self._shape = shape
        members = from_process_group(group, "moe high throughput")
        row = max(shape.row_nbytes, shape.hidden * shape.dtype.itemsize) + _META_NBYTES * shape.top_k
        rows = shape.max_num_tokens * members.exchange.world_size
        self._exchange = HighThroughput(members, 2 * (rows * (row + 64) + (1 << 16)), timeout=timeout)

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """As `Backend.forward`. **Collective.**"""
        exchange, num_experts = self._exchange, self._shape.num_experts
        if not self._shape.use_fp8:
            rows, idx, weights, handle = dispatch_tokens(exchange, x, topk_idx, topk_weights, num_experts)
            return combine_tokens(exchange, experts.flat(rows, idx, weights), handle)
        packed, scales = self._shape.pack(x)
        came = exchange.dispatch((packed, scales), topk_idx, topk_weights, num_experts)
        assert came.topk_idx is not None
        assert came.topk_weights is not None
        assert came.handle is not None
        y = experts.flat(self._shape.unpack(tuple(came.x)), came.topk_idx, came.topk_weights)
        return exchange.combine(y, came.handle)[0]


class OneSidedLayer(OverExchange[OneSided]):
    """Tokens by `OneSided`, ids and weights along with them.

    Args:
        shape: of the layers.
        group: of the ranks; None: the default one.
        timeout: of calls.
    """

    def __init__(self, shape: MoeShape, group: dist.ProcessGroup | None, timeout: Timeout | Unset) -> None:
        self._shape = shape
        members = from_process_group(group, "moe one-sided")
        self._first, self._last = _local_experts(shape, members.exchange.rank, members.exchange.world_size)
        nbytes = shape.row_nbytes + 8 * shape.top_k
        self._exchange = OneSided(
            members, shape.max_num_tokens, shape.top_k, shape.num_experts, nbytes,
            shape.hidden * shape.dtype.itemsize, timeout=timeout,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """As `Backend.forward`. **Collective.**"""
        shape, limit = self._shape, self._shape.max_num_tokens
        ids = topk_idx.to(torch.int32)
        payloads = [*shape.pack(x), ids, topk_weights]
        came = self._exchange.dispatch(ids, payloads, limit, invalid_token_expert_id=shape.num_experts)
        *packed, their_ids, their_weights = [view.flatten(0, 1) for view in came]
        local = _to_local(their_ids, self._first, self._last)
        y = experts.flat(shape.unpack(tuple(packed)), local, their_weights)
        return self._exchange.combine(y.unflatten(0, (-1, limit)), limit)


class TwoSidedLayer(OverExchange[TwoSided]):
    """Tokens by `TwoSided`: memory does not grow with them.

    Args:
        shape: of the layers.
        group: of the ranks; None: the default one.
        timeout: of calls.
    """

    def __init__(self, shape: MoeShape, group: dist.ProcessGroup | None, timeout: Timeout | Unset) -> None:
        self._shape = shape
        members = from_process_group(group, "moe two-sided")
        self._first, self._last = _local_experts(shape, members.exchange.rank, members.exchange.world_size)
        self._exchange = TwoSided(members, num_nbytes=_FIFO_NBYTES, timeout=timeout)

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """As `Backend.forward`. **Collective.**"""
        shape, exchange = self._shape, self._exchange
        ids = topk_idx.to(torch.int32)
        info, their_ids, weights = exchange.prepare(
            ids, topk_weights, shape.max_num_tokens, shape.num_experts
        )
        packed = tuple(exchange.alltoallv(part, info) for part in shape.pack(x))
        y = experts.flat(shape.unpack(packed), _to_local(their_ids, self._first, self._last), weights)
        return exchange.combine(y, info, shape.top_k)


def _local_experts(shape: MoeShape, rank: int, world_size: int) -> tuple[int, int]:
    per_rank = shape.num_experts // world_size
    return rank * per_rank, (rank + 1) * per_rank


def _to_local(ids: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Local experts, and -1 for those of other ranks and none."""
    return torch.where((ids >= first) & (ids < last), ids - first, -1).to(torch.int64)
