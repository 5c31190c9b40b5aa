"""Dispatch and combine of virtual ranks in one process, launch by launch."""

import torch

from tcomm.kernels.moe_high_throughput import StagedTokens, fetch_heads, gather_rows, stage_tokens
from tcomm.kernels.moe_layout import find_layout
from tcomm.kernels.moe_return import return_rows, sum_places
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription

DISPATCH, COMBINE = CallDescription("dispatch", "int64"), CallDescription("combine", "int64")


class VirtualTokens:
    """Ranks that all have as many tokens.

    Args:
        rows: [W, T, H].
        idx: [W, T, k] int64.
        weights: [W, T, k] float32.
        num_experts: of all ranks.
    """

    def __init__(self, rows, idx, weights, num_experts, mode="grid", staging_bytes=1 << 18):
        self.world, self.num_tokens = rows.shape[:2]
        self.rows, self.idx, self.weights = rows, idx, weights
        self.arena = VirtualArena(self.world, rows.device, staging_bytes, mode)
        layouts = [find_layout(one, num_experts, self.world) for one in idx]
        self.slots = torch.stack([one.slots for one in layouts])
        self.prefix = torch.stack([one.prefix for one in layouts])
        self.width = min(idx.shape[2], self.world)

    def dispatch(self, num_rows):
        """Rows, ids, weights and places of all ranks: [W, num_rows, ...]."""
        words, num_topk = self.rows.view(torch.int64), self.idx.shape[2]
        nothing = words.new_empty(self.world, self.num_tokens, 0, dtype=torch.int32)
        half = self.arena.staging.layout.half_bytes
        regions = DispatchRegions(half, self.world, words.shape[2] * 8, 2 * num_topk)
        weights = self.weights.view(torch.int32)
        tokens = StagedTokens(words, self.idx, weights, nothing, self.slots, self.prefix, self.width)
        rows = words.new_zeros(self.world, num_rows, words.shape[2])
        facts = words.new_full((self.world, num_rows, 2 * num_topk), -1, dtype=torch.int32)
        self.row_slots = words.new_full((self.world, num_rows), -1)
        fetched = words.new_zeros(self.world, self.world)
        for first in range(0, max(self.num_tokens, 1), regions.num_tokens):
            epoch = stage_tokens(tokens, self.arena, DISPATCH, 60.0, regions, first)
            heads = fetch_heads(self.arena, DISPATCH, 60.0, epoch, regions)
            gather_rows(
                rows, facts, self.row_slots, heads, fetched, self.arena, DISPATCH, 60.0, epoch, regions,
                self.width, first,
            )  # fmt: skip
            ranks = torch.arange(self.world)
            fetched += heads[ranks, :, self.world + ranks]
        self.heads = heads
        self.matrix = heads[:, :, : self.world].to(torch.int32).contiguous()
        told = facts[:, :, num_topk:].contiguous().view(torch.float32)
        return rows.view(self.rows.dtype), facts[:, :, :num_topk], told

    def combine(self, results, weights, terms=()):
        """Sums of all ranks' rows [W, num_rows, H] and weights: [W, T, ...]."""
        words, half = results.view(torch.int64), self.arena.staging.layout.half_bytes
        regions = ReturnRegions(half, self.width, words.shape[2] * 8, weights.shape[2])
        out = results.new_zeros(self.world, self.num_tokens, results.shape[2])
        summed = weights.new_zeros(self.world, self.num_tokens, weights.shape[2])
        for first in range(0, max(self.num_tokens, 1), regions.num_tokens):
            epoch = return_rows(
                words, self.row_slots, weights.view(torch.int32), self.matrix, self.arena, COMBINE, 60.0,
                regions, first,
            )  # fmt: skip
            sum_places(out, summed, self.slots, terms, self.arena, COMBINE, 60.0, epoch, regions, first)
        return out, summed
