"""Exchanges of tokens as they are written on torch.distributed, to measure against."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["DeduplicatedGloo", "ExpandedGloo"]


class ExpandedGloo:
    """A row for each (token, expert) by `all_to_all_single`, and back the same way, as experts got it.

    Args:
        num_experts: of all ranks.
    """

    def __init__(self, num_experts: int) -> None:
        self._per_rank = num_experts // dist.get_world_size()

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what the experts return, [T, H]. **Collective.**"""
        num_tokens, top_k = topk_idx.shape
        experts, order = topk_idx.flatten().sort(stable=True)
        sent = torch.bincount(experts // self._per_rank, minlength=dist.get_world_size())
        rows, received = _exchange_rows(x.index_select(0, order // top_k), sent)
        _exchange_rows((experts % self._per_rank).to(torch.int32).unsqueeze(1), sent, received)
        back, _ = _exchange_rows(rows, received, sent)
        where = torch.empty_like(order)
        where[order] = torch.arange(len(order), device="cpu")
        total = torch.zeros(num_tokens, x.shape[1], dtype=torch.float32, device="cpu")
        for j, places in enumerate(where.view(num_tokens, top_k).unbind(1)):
            total.addcmul_(back.index_select(0, places), topk_weights[:, j : j + 1])
        return total.to(x.dtype)


class DeduplicatedGloo:
    """A row for each (token, rank) with its experts and weights, and a sum for each back. Experts likewise.

    Args:
        num_experts: of all ranks.
    """

    def __init__(self, num_experts: int) -> None:
        self._per_rank = num_experts // dist.get_world_size()

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The sum of what the ranks return, [T, H]. **Collective.**"""
        world_size = dist.get_world_size()
        in_rank = torch.zeros(len(x), world_size, dtype=torch.bool, device="cpu")
        in_rank.scatter_(1, topk_idx // self._per_rank, True)
        tokens = in_rank.T.nonzero()[:, 1]
        sent = in_rank.sum(0)
        rows, received = _exchange_rows(x.index_select(0, tokens), sent)
        about = torch.cat([topk_idx.to(torch.int32), topk_weights.view(torch.int32)], 1)
        _exchange_rows(about.index_select(0, tokens), sent, received)
        back, _ = _exchange_rows(rows, received, sent)
        total = torch.zeros(x.shape, dtype=torch.float32, device="cpu")
        for part, places in zip(back.split(sent.tolist()), tokens.split(sent.tolist()), strict=True):
            total.index_add_(0, places, part.float())
        return total.to(x.dtype)


def _exchange_rows(
    rows: torch.Tensor, sent: torch.Tensor, received: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for each rank one after another, [N, *]; their numbers are exchanged first where unknown."""
    if received is None:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
    numbers = received.tolist()
    out = torch.empty(sum(numbers), *rows.shape[1:], dtype=rows.dtype, device="cpu")
    dist.all_to_all_single(out.view(torch.uint8), rows.view(torch.uint8), numbers, sent.tolist())
    return out, received
