"""The slot of each choice of an expert, and how often each slot was chosen."""

from __future__ import annotations

import numpy as np
import torch

from tcomm.memory.expert_slots import CHOICES_A_BLOCK, GOLDEN, SHARE_BITS, SlotCounter

__all__ = ["choose_slots", "count_slots"]


def choose_slots(
    topk_idx: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    share: torch.Tensor | None,
    salt: int,
    out: torch.Tensor,
) -> None:
    """Write the slot of each choice.

    Choices of an expert in a block of 256 are numbered; `h` is that number + block + expert + salt. Replica
    `h % count` serves the choice; with shares, the first whose threshold is above `h * 40503 % 65536`.

    Example: k=2, topk=[[0, 1], [0, 2], [0, -1]], map=[[0, 3], [1, -1], [2, -1]], count=[2, 1, 1], salt 0 ->
    out=[[0, 1], [3, 2], [0, -1]].

    Args:
        topk_idx: [T, k] int64 or int32; what is no expert gets -1.
        logical_to_physical_map: [E, X] int64.
        logical_replica_count: [E] int64; an expert without a replica gets -1.
        share: [E, X] int32 thresholds, or None.
        salt: added to each `h`.
        out: [T, k] of the dtype of `topk_idx`, contiguous.
    """
    num_experts, width = logical_to_physical_map.shape
    chosen = topk_idx.reshape(-1).to(torch.int64)
    is_there = (chosen >= 0) & (chosen < num_experts)
    block = torch.arange(len(chosen), device=chosen.device) // CHOICES_A_BLOCK
    # What is none is numbered apart from all experts.
    number = _numbers(torch.where(is_there, chosen, num_experts))
    expert = torch.where(is_there, chosen, 0)
    h = number + block + expert + salt
    count = logical_replica_count[expert].clamp(max=width)
    if share is None:
        place = h % count.clamp(min=1)
    else:
        level = h * GOLDEN % (1 << SHARE_BITS)
        is_passed = level[:, None] >= share[expert]
        is_passed &= torch.arange(width, device=chosen.device) < count[:, None] - 1
        place = is_passed.sum(dim=1)
    slot = logical_to_physical_map[expert, place]
    out.view(-1).copy_(torch.where(is_there & (count > 0), slot, -1))


def _numbers(expert: torch.Tensor) -> torch.Tensor:
    """How many equal ones come before each in its block, int32."""
    blocks = -(-len(expert) // CHOICES_A_BLOCK)
    keys = np.zeros(blocks * CHOICES_A_BLOCK, np.int32)
    keys[: len(expert)] = expert.numpy()
    index = np.arange(CHOICES_A_BLOCK, dtype=np.int32)
    # With the place in its low bits a key is found again after a sort, which is much faster than an argsort.
    ordered = np.sort(keys.reshape(blocks, CHOICES_A_BLOCK) * CHOICES_A_BLOCK + index, axis=1)
    equal = ordered // CHOICES_A_BLOCK
    first = np.zeros_like(ordered)
    first[:, 1:] = np.where(equal[:, 1:] != equal[:, :-1], index[1:], 0)
    first = np.maximum.accumulate(first, axis=1)
    numbers = np.empty_like(ordered)
    np.put_along_axis(numbers, ordered % CHOICES_A_BLOCK, index - first, axis=1)
    return torch.from_numpy(numbers.reshape(-1)[: len(expert)])


def count_slots(slots: torch.Tensor, counter: SlotCounter) -> None:
    """Add how often each slot was chosen to the counter.

    Example: slots=[[0, 1], [3, 2], [0, -1]], first_slot 2, load=[5, 5] -> load=[6, 6]; with one unpadded
    token it stays.

    Args:
        slots: [T, k]; -1 for none.
        counter: what is added to.
    """
    if counter.should_record is not None and not bool(counter.should_record):
        return
    num = counter.num_unpadded_tokens
    counted = slots if num is None else slots[: max(int(num), 0)]
    local = counted.reshape(-1).to(torch.int64) - counter.first_slot
    local = local[(counted.reshape(-1) >= 0) & (local >= 0) & (local < len(counter.load))]
    counter.load.add_(torch.bincount(local, minlength=len(counter.load)))
