"""Where each token goes when one copy goes to each rank that holds an expert of it."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.expert_ids import check_expert_ids

__all__ = ["Routes", "as_word_rows", "make_routes"]

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@dataclasses.dataclass(frozen=True)
class Routes:
    """The copies of this rank's tokens. Made on the device, without waiting for it.

    Example: 2 ranks, 4 experts, ids [[3, 2], [0, 3], [-1, 1]] -> ranks [[1, -1], [0, 1], [-1, 0]],
    slots [[0, -1], [0, 1], [-1, 1]], counts [2, 2].
    """

    ranks: torch.Tensor
    """[T, k] int64: where the copy goes, at the first entry of the token that names that rank; else -1."""
    slots: torch.Tensor
    """[T, k] int64: how many tokens before this one go there, too; -1 where no copy goes."""
    counts: torch.Tensor
    """[R] int64: copies for each rank."""

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What an engine takes."""
        return self.ranks, self.slots, self.counts

    def num_remote(self, rank: int) -> int:
        """Copies for other ranks than `rank`. Waits for the device."""
        return int(self.counts.sum() - self.counts[rank])


def make_routes(topk_ids: torch.Tensor, num_experts: int, world_size: int) -> Routes:
    """The copies for tokens with these experts.

    Args:
        topk_ids: [T, k] int32 or int64, global ids of experts; -1: no selection, and so is, on a GPU, what is
            out of range.
        num_experts: of all ranks; rank r holds those from `r * num_experts / world_size` on.
        world_size: number of ranks.

    Raises:
        ConfigError: when the ids are no such tensor, or (on a CPU) one is out of range; names its token.
    """
    if topk_ids.dim() != 2 or topk_ids.dtype not in {torch.int32, torch.int64}:
        raise ConfigError(
            f"expert ids are {topk_ids.dtype} {list(topk_ids.shape)}; needed int32 or int64 [tokens, top_k]"
        )
    if topk_ids.device.type == "cpu":
        check_expert_ids(topk_ids, num_experts)
    ids = topk_ids.to(torch.int64)
    # A GPU is not waited for to refuse what is out of range: there it is no selection.
    known = (ids >= 0) & (ids < num_experts)
    ranks = torch.where(known, ids // (num_experts // world_size), -1)
    top_k = ids.shape[1]
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=ids.device).tril(-1)
    repeated = ((ranks[:, :, None] == ranks[:, None, :]) & earlier).any(2)
    ranks = ranks.masked_fill(repeated, -1)
    goes = (ranks[:, :, None] == torch.arange(world_size, device=ids.device)).any(1)
    before = goes.to(torch.int64).cumsum(0) - 1
    slots = torch.where(ranks >= 0, before.gather(1, ranks.clamp(min=0)), -1)
    return Routes(ranks, slots, goes.sum(0))


def as_word_rows(x: torch.Tensor) -> torch.Tensor:
    """x, of any dtype, as rows of integers as wide as divides a row: what only moves needs no type.

    Args:
        x: [T, ...], contiguous.

    Returns:
        [T, words], the same memory; a copy where x lies at an odd address.
    """
    numel = 1
    for length in x.shape[1:]:
        numel *= length
    rows = x.view(torch.uint8 if x.dtype is torch.bool else x.dtype).view(x.shape[0], numel)
    nbytes = numel * x.itemsize
    dtype = next(dtype for size, dtype in _WORDS if nbytes % size == 0) if nbytes else torch.uint8
    if not nbytes or not x.shape[0]:
        return rows.new_empty(x.shape[0], nbytes // dtype.itemsize, dtype=dtype)
    if x.data_ptr() % 16:
        rows = rows.clone()
    return rows.view(dtype)
