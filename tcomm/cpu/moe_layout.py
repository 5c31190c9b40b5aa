"""Where tokens go, worked out on a CPU: the twin of `tcomm.kernels.moe_layout`."""

from __future__ import annotations

import torch

__all__ = ["count_experts", "find_holders", "find_slots", "list_slots"]


def find_holders(topk_idx: torch.Tensor, num_experts: int, world_size: int) -> torch.Tensor:
    """[T, k] int64: the rank that holds each expert of `topk_idx`, -1 where none was selected."""
    return topk_idx.div(num_experts // world_size, rounding_mode="floor")


def count_experts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] int32: how often each expert was selected."""
    return torch.bincount(topk_idx.reshape(-1) + 1, minlength=num_experts + 1)[1:].to(torch.int32)


def find_slots(holders: torch.Tensor, world_size: int) -> torch.Tensor:
    """[T, R] int64: how many other ranks come before a rank in a token's list; -1 where it does not come.

    Example: R=3, holders [[2, 0, 2], [-1, 1, -1]] -> [[1, -1, 0], [-1, 0, -1]].
    """
    num_tokens, topk = holders.shape
    steps = torch.arange(topk, device="cpu").expand(num_tokens, topk)
    first = torch.full((num_tokens, world_size + 1), topk, device="cpu")
    first = first.scatter_reduce_(1, holders + 1, steps, "amin")[:, 1:]
    slots = torch.zeros(num_tokens, world_size, dtype=torch.int64, device="cpu")
    for rank in range(world_size):
        slots += first[:, rank, None] < first
    return slots.masked_fill_(first == topk, -1)


def list_slots(slots: torch.Tensor, width: int) -> list[torch.Tensor]:
    """For each rank [n] int32: `token * width + place` of each token that goes there, ascending.

    Example: width=2, slots [[1, -1, 0], [-1, 0, -1]] -> [1], [2], [0].
    """
    by_rank = slots.t()
    ranks, tokens = (by_rank >= 0).nonzero(as_tuple=True)
    entries = (tokens * width + by_rank[ranks, tokens]).to(torch.int32)
    return list(entries.split(torch.bincount(ranks, minlength=slots.shape[1]).tolist()))
