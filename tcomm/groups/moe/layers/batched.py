"""The backend that brings each token once to each of its experts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tcomm.cpu.moe_quantise import dequantise
from tcomm.groups.arguments import Timeout, Unset
from tcomm.groups.moe.layers.contract import Experts, MoeShape, OverExchange
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.setup import from_process_group

__all__ = ["LowLatencyLayer"]


class LowLatencyLayer(OverExchange[LowLatency]):
    """Tokens by `LowLatency`; experts write into the memory that their results are taken from.

    Args:
        shape: of the layers.
        group: of the ranks; None: the default one.
        timeout: of calls.
    """

    def __init__(self, shape: MoeShape, group: dist.ProcessGroup | None, timeout: Timeout | Unset) -> None:
        self._shape = shape
        members = from_process_group(group, "moe low latency")
        self._exchange = LowLatency(
            members, shape.max_num_tokens, shape.hidden, shape.num_experts, max_topk=shape.top_k,
            dtype=shape.dtype, timeout=timeout,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """As `Backend.forward`. **Collective.**"""
        exchange, shape = self._exchange, self._shape
        came, counts, handle, _ = exchange.dispatch(x, topk_idx, use_fp8=shape.use_fp8)
        rows = dequantise(*came).to(shape.dtype) if isinstance(came, tuple) else came
        y = experts.batched(rows, counts)
        return exchange.combine(y, topk_idx, topk_weights, handle)[0]
