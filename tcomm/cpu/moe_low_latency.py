"""Low-latency dispatch and combine on the host: vectorised copies between slots and packed rows.

Where things lie is `tcomm.memory.moe_slots`; the protocol is in `docs/moe/low_latency.md`.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = [
    "Plan", "add_weighted", "as_words", "find_rows", "make_plan", "mark", "numbers_of", "pack_ranges",
]  # fmt: skip

_EPOCH_SHIFT = 32
_LOW = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Plan:
    """The copies that a rank gives in one call, ordered by (destination, local expert, token)."""

    tokens: torch.Tensor
    """[C] int64, token of each copy."""
    counts: torch.Tensor
    """[R, El] int64, copies for each expert."""
    starts: list[int]
    """R + 1 numbers: copies for rank r are those from `starts[r]` to `starts[r + 1]`."""
    owners: torch.Tensor
    """[T, k] int64, rank of each choice; -1 where nothing was chosen."""
    slots: torch.Tensor
    """[T, k] int64, slot of its copy among those for that rank; -1 where nothing was chosen."""


def make_plan(topk_idx: torch.Tensor, num_experts: int, world_size: int) -> Plan:
    """Number the copies of one per (token, expert).

    Example: 4 experts on 2 ranks, topk_idx [[0, 3], [1, -1], [0, 2]]: rank 0 gets expert 0 of tokens 0 and 2
    and expert 1 of token 1, so tokens = [0, 2, 1 | 2, 0] and slots = [[0, 1], [2, -1], [1, 0]].

    Args:
        topk_idx: [T, k] int64, experts in range, or -1. A token that names one twice gives one copy.
        num_experts: a multiple of world_size.
        world_size: ranks.
    """
    num_tokens, num_local = topk_idx.shape[0], num_experts // world_size
    tokens = torch.arange(num_tokens, device="cpu").unsqueeze(1)
    chosen = topk_idx >= 0
    keys, copies = torch.unique((topk_idx * num_tokens + tokens)[chosen], return_inverse=True)
    experts = keys // max(num_tokens, 1)
    counts = torch.bincount(experts, minlength=num_experts).view(world_size, num_local)
    ends = counts.sum(1).cumsum(0)
    starts = torch.nn.functional.pad(ends, (1, 0))
    owners = torch.where(chosen, topk_idx // num_local, -1)
    slots = torch.full_like(topk_idx, -1)
    slots[chosen] = copies - starts[owners[chosen]]
    return Plan(keys % max(num_tokens, 1), counts, starts.tolist(), owners, slots)


def mark(numbers: torch.Tensor, epoch: int) -> torch.Tensor:
    """int64 words (epoch << 32 | number), as they travel."""
    return numbers | _signed_epoch(epoch)


def numbers_of(words: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers in words, and whether each of them is of that epoch."""
    return words & _LOW, words & ~_LOW == _signed_epoch(epoch)


def _signed_epoch(epoch: int) -> int:
    word = epoch << _EPOCH_SHIFT
    return word - (1 << 64) if word >> 63 else word


def find_rows(counts: torch.Tensor, capacity: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Where copies go in a packed result [El, capacity].

    Example: counts [[1, 2], [2, 0]] of 2 sources for 2 experts, capacity 8: begins [[0, 1], [0, 2]]; the
    slots of source 0 go to rows [0, 8, 9], those of source 1 to [1, 2].

    Args:
        counts: [R, El] int64, copies from each source.
        capacity: rows of an expert.

    Returns:
        (begins, rows): [El, R] int64, the first row of each source; and for each source [n] int64, the row
        of each of its slots, counted through all experts.
    """
    begins = (counts.cumsum(0) - counts).t().contiguous()
    first_slots = counts.cumsum(1) - counts
    base = torch.arange(counts.shape[1], device="cpu") * capacity + begins.t() - first_slots
    rows = []
    for source, given in enumerate(counts):
        repeated = torch.repeat_interleave(base[source], given)
        rows.append(repeated + torch.arange(len(repeated), device="cpu"))
    return begins, rows


def pack_ranges(begins: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[El, R] int64: begin << 32 | count, of [El, R] begins and [R, El] counts."""
    return begins << _EPOCH_SHIFT | counts.t()


def as_words(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous rows [n, H] as int64 words: copying by index is quickest in wide elements."""
    return rows.view(torch.uint8).view(torch.int64)


def add_weighted(
    acc: torch.Tensor, rows: torch.Tensor, which: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> None:
    """acc[t] += weights[t] * rows[which[t]] in fp32, for each t that is chosen.

    Args:
        acc: [T, H] float32.
        rows: [n, H].
        which: [T] int64; anything where not chosen.
        weights: [T] float32.
        chosen: [T] bool.
    """
    if chosen.all():
        acc.add_(rows.index_select(0, which).float().mul_(weights.unsqueeze(1)))
        return
    tokens = chosen.nonzero().squeeze(1)
    if len(tokens):
        term = rows.index_select(0, which[tokens]).float().mul_(weights[tokens].unsqueeze(1))
        acc.index_add_(0, tokens, term)
