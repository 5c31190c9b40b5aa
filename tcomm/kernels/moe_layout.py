"""Where tokens go: counts for each rank and expert, and a token's place among those that go to a rank.

A program works for one rank and looks at all tokens in order, so places follow from the input alone. Nothing
is sent.

Meaning: `tcomm.cpu.moe_layout`.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.launch import refuse_host_memory

__all__ = ["FoundLayout", "find_layout"]

_COMPILED_BLOCK = 256
_INTERPRETED_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens"])
def _layout_kernel(
    topk_ptr,  # [T, TOPK] int64
    slots_ptr,  # [T, W] int32
    prefix_ptr,  # [T + 1, W] int32
    experts_ptr,  # [E] int32, zeroed
    num_tokens,
    TOPK: tl.constexpr, WORLD: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: slots[t, r], how many ranks come before r in the list of t, or -1; and prefix sums.

    Example: W=2, LOCAL=2, topk=[[3, 0], [1, -1]] -> slots=[[1, 0], [0, -1]], prefix=[[0, 0], [1, 1], [2, 1]],
    experts=[1, 1, 0, 1].
    """
    rank = tl.program_id(0)
    total = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int64)
    while start < num_tokens:
        tokens = start + tl.arange(0, BLOCK)
        here = tokens < num_tokens
        slot = tl.full((BLOCK,), -1, tl.int32)
        seen = tl.full((BLOCK,), 0, tl.int32)
        num_seen = tl.full((BLOCK,), 0, tl.int32)
        for choice in tl.static_range(TOPK):
            expert = tl.load(topk_ptr + tokens * TOPK + choice, mask=here, other=-1).to(tl.int32)
            is_there = (expert >= 0) & (expert < WORLD * LOCAL)
            holder = tl.where(is_there, expert, 0) // LOCAL
            bit = tl.where(is_there, 1 << holder, 0)
            is_new = is_there & ((seen & bit) == 0)
            is_mine = is_there & (holder == rank)
            slot = tl.where(is_new & is_mine, num_seen, slot)
            num_seen += is_new.to(tl.int32)
            seen |= bit
            tl.atomic_add(experts_ptr + expert, 1, mask=is_mine, sem="relaxed")
        reaches = (slot >= 0).to(tl.int32)
        before = total + tl.cumsum(reaches, 0) - reaches
        tl.store(slots_ptr + tokens * WORLD + rank, slot, mask=here)
        tl.store(prefix_ptr + tokens * WORLD + rank, before, mask=here)
        total += tl.sum(reaches, 0)
        start += BLOCK
    tl.store(prefix_ptr + num_tokens.to(tl.int64) * WORLD + rank, total)


@dataclasses.dataclass(frozen=True)
class FoundLayout:
    """Where the tokens of one rank go."""

    slots: torch.Tensor
    """[T, R] int32: the place of each rank in a token's order of ranks; -1 where it does not go."""
    prefix: torch.Tensor
    """[T + 1, R] int32: how many of the tokens before go to each rank; of all of them last."""
    num_tokens_per_expert: torch.Tensor
    """[E] int32."""


def find_layout(topk_idx: torch.Tensor, num_experts: int, world_size: int) -> FoundLayout:
    """Find where tokens go. Not collective. Experts out of range count as none.

    Args:
        topk_idx: [T, k] int64, contiguous.
        num_experts: of all ranks, a multiple of their number.
        world_size: number of ranks, 16 at most.

    Raises:
        CapabilityError: when there is nothing to run a kernel on.
    """
    num_tokens, topk = topk_idx.shape
    device = topk_idx.device
    if device.type == "cpu":
        refuse_host_memory()
    slots = torch.empty(num_tokens, world_size, dtype=torch.int32, device=device)
    prefix = torch.empty(num_tokens + 1, world_size, dtype=torch.int32, device=device)
    experts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    block = min(_INTERPRETED_BLOCK, triton.next_power_of_2(max(num_tokens, 1)))
    with torch.cuda.device_of(topk_idx):
        _layout_kernel[(world_size,)](
            topk_idx, slots, prefix, experts, num_tokens,
            TOPK=topk, WORLD=world_size, LOCAL=num_experts // world_size,
            BLOCK=block if is_interpreted() else _COMPILED_BLOCK,
        )  # fmt: skip
    return FoundLayout(slots, prefix, experts)
