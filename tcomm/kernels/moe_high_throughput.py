"""Dispatch with one copy of a token for each rank that needs it, and exact sizes.

It is pulled, for a token's row is the same for all: every rank stages its tokens at home, with a list for
each destination, and fetches the rows on its lists. The way back is `tcomm.kernels.moe_return`.

=========  ========================================  ===================================
launch     does                                      waits for
=========  ========================================  ===================================
stage      own tokens, lists and counts at home      nobody
heads      all counts into one table                 all ranks' stage
gather     rows, facts and places into results       all ranks' stage, and ends the call
=========  ========================================  ===================================

Needs: rows of a multiple of 16 bytes; regions of `tcomm.memory.token_regions`, the same on all ranks. Tensors
of virtual ranks have one more dimension in front, and are contiguous.

Source: the layouts of DeepEP's intranode kernels, with prefix sums instead of queues.

Meaning: `tcomm.cpu.moe_high_throughput`, with the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from tcomm.kernels.device import begin_call, finish_call, launched_rank, page_of, pointer_to, record_late
from tcomm.kernels.launch import launch_part, staging_of
from tcomm.kernels.moe_rows import (
    WORDS_A_TILE,
    blocks_for,
    copy_facts,
    copy_row,
    half_of,
    lanes_for,
    tile_for,
)
from tcomm.kernels.phases import await_ranks, open_word, publish_last
from tcomm.memory.base import KernelArena
from tcomm.memory.token_regions import DispatchRegions
from tcomm.signature import CallDescription

__all__ = ["StagedTokens", "fetch_heads", "gather_rows", "stage_tokens"]


@triton.jit(do_not_specialize=["num_tokens", "first", "signature", "rank", "budget"])
def _stage_tokens_kernel(
    x_ptr, ids_ptr,  # [T, ROW_WORDS] int64, [T, ID_WORDS] int64
    weights_ptr, scales_ptr,  # [T, WEIGHT_WORDS] int32, [T, SCALE_WORDS] int32
    slots_ptr, prefix_ptr,  # [T, W] int32, [T + 1, W] int32
    num_tokens, first,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr,
    ROW_WORDS: tl.constexpr, ID_WORDS: tl.constexpr, WEIGHT_WORDS: tl.constexpr, SCALE_WORDS: tl.constexpr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, LISTS: tl.constexpr, FACTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FACT_LANES: tl.constexpr,
):  # fmt: skip
    """Every rank puts tokens first to first + PIECE, their facts, lists and counts into its own half.

    Example: W=2, WIDTH=2, slots=[[0, -1], [1, 0]] -> lists [0, 3] for rank 0, [2] for rank 1, counts 2 and 1.
    """
    rank = launched_rank(rank)
    num_tokens = num_tokens.to(tl.int64)
    if VIRTUAL:
        x_ptr += rank * num_tokens * ROW_WORDS
        ids_ptr += rank * num_tokens * ID_WORDS
        weights_ptr += rank * num_tokens * WEIGHT_WORDS
        scales_ptr += rank * num_tokens * SCALE_WORDS
        slots_ptr += rank * num_tokens * WORLD
        prefix_ptr += rank * (num_tokens + 1) * WORLD
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    last = tl.minimum(first + PIECE, num_tokens)
    peers = tl.arange(0, LANES)
    is_peer = peers < WORLD
    begun = tl.load(prefix_ptr + tl.minimum(first, num_tokens) * WORLD + peers, mask=is_peer, other=0)

    FACT_WORDS: tl.constexpr = ID_WORDS + WEIGHT_WORDS + SCALE_WORDS
    token = first + tl.program_id(0).to(tl.int64)
    while token < last:
        at = token - first
        row_ptr = pointer_to(staging_ptrs, rank, half + ROWS + at * ROW_WORDS * 8, tl.int64)
        copy_row(x_ptr + token * ROW_WORDS, row_ptr, ROW_WORDS, BLOCK)
        facts_ptr = pointer_to(staging_ptrs, rank, half + FACTS, tl.int32) + at * FACT_WORDS
        copy_facts(ids_ptr + token * ID_WORDS, facts_ptr, ID_WORDS, FACT_LANES)
        copy_facts(weights_ptr + token * WEIGHT_WORDS, facts_ptr + ID_WORDS, WEIGHT_WORDS, FACT_LANES)
        facts_ptr += ID_WORDS + WEIGHT_WORDS
        copy_facts(scales_ptr + token * SCALE_WORDS, facts_ptr, SCALE_WORDS, FACT_LANES)
        slot = tl.load(slots_ptr + token * WORLD + peers, mask=is_peer, other=-1)
        place = tl.load(prefix_ptr + token * WORLD + peers, mask=is_peer, other=0) - begun
        list_ptr = pointer_to(staging_ptrs, rank, half + LISTS, tl.int32)
        entry = (token * WIDTH).to(tl.int32) + slot
        tl.store(list_ptr + peers * PIECE + place, entry, mask=is_peer & (slot >= 0))
        token += tl.num_programs(0)

    if tl.program_id(0) == 0:
        tag = (word >> 32) << 32
        head_ptr = pointer_to(staging_ptrs, rank, half, tl.int64)
        total = tl.load(prefix_ptr + num_tokens * WORLD + peers, mask=is_peer, other=0)
        ended = tl.load(prefix_ptr + tl.maximum(last, 0) * WORLD + peers, mask=is_peer, other=0)
        tl.store(head_ptr + peers, tag | total.to(tl.int64), mask=is_peer)
        tl.store(head_ptr + WORLD + peers, tag | (ended - begun).to(tl.int64), mask=is_peer)
        tl.store(head_ptr + 2 * WORLD, tag | num_tokens)
    publish_last(page, pad_ptrs, rank, 0, word, WORLD, LANES)


@dataclasses.dataclass(frozen=True)
class StagedTokens:
    """What a rank dispatches, as kernels take it; empty tensors where something is not there."""

    rows: torch.Tensor
    """[T, row_nbytes / 8] int64."""
    ids: torch.Tensor
    """[T, k] int64."""
    weights: torch.Tensor
    """[T, k] int32, the bits of float32."""
    scales: torch.Tensor
    """[T, words] int32."""
    slots: torch.Tensor
    """[T, R] int32; see `tcomm.kernels.moe_layout`."""
    prefix: torch.Tensor
    """[T + 1, R] int32."""
    width: int
    """Places of a token."""


def stage_tokens(
    tokens: StagedTokens,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    regions: DispatchRegions,
    first: int,
) -> int | None:
    """Begin a dispatch: stage the tokens from `first` on that fit a piece. **Collective.**

    Returns:
        The epoch, for the other parts; None where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run a kernel on.
    """
    num_tokens = tokens.rows.shape[-2]
    num_facts = [each.shape[-1] for each in (tokens.ids, tokens.weights, tokens.scales)]
    return launch_part(
        _stage_tokens_kernel, blocks_for(min(regions.num_tokens, num_tokens - first), arena), arena, call,
        timeout, None, tokens.rows, tokens.ids, tokens.weights, tokens.scales, tokens.slots, tokens.prefix,
        num_tokens, first,
        HALF_BYTES=staging_of(arena).layout.half_bytes, ROW_WORDS=tokens.rows.shape[-1],
        ID_WORDS=num_facts[0], WEIGHT_WORDS=num_facts[1], SCALE_WORDS=num_facts[2], WIDTH=tokens.width,
        **_places_of(regions),
    )  # fmt: skip


@triton.jit(do_not_specialize=["signature", "rank", "budget"])
def _fetch_heads_kernel(
    x_ptr, out_ptr,  # [W, 2 W + 1] int64, twice the same
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, HEAD_LANES: tl.constexpr,
):  # fmt: skip
    """out[s] = the counts of rank s, without the epoch that they come with, or zeros; for one program.

    Example: W=2, rank 1 sends 3 and 4 rows of its 5 tokens in one piece -> out[1] = [3, 4, 3, 4, 5].
    """
    rank = launched_rank(rank)
    HEAD: tl.constexpr = 2 * WORLD + 1
    if VIRTUAL:
        out_ptr += rank * WORLD * HEAD
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    offs = tl.arange(0, HEAD_LANES)
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        for source in tl.static_range(WORLD):
            head = tl.load(pointer_to(staging_ptrs, source, half, tl.int64) + offs, mask=offs < HEAD, other=0)
            stale = (offs < HEAD) & ((head >> 32) != (word >> 32))
            if tl.sum(stale.to(tl.int32), axis=0) > 0:
                record_late(page, source, word)
            tl.store(out_ptr + source * HEAD + offs, head & 0xFFFFFFFF, mask=offs < HEAD)
    else:
        for source in tl.static_range(WORLD):
            tl.store(out_ptr + source * HEAD + offs, tl.full((HEAD_LANES,), 0, tl.int64), mask=offs < HEAD)


def fetch_heads(
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None,
    regions: DispatchRegions,
) -> torch.Tensor:
    """Wait for all ranks' tokens, and collect what they say of them.

    Returns:
        [R, 2R + 1] int64: of each rank, rows to each in all pieces, in this piece, and its tokens; 0 where
        one did not come.

    Raises:
        CapabilityError: when there is nothing to run a kernel on.
    """
    size = regions.world_size
    shape = (size, regions.num_head_words)
    # Not zeroed here: ranks in streams of their own would not wait for that in the middle of a call.
    heads = torch.empty((size, *shape) if arena.is_virtual else shape, dtype=torch.int64, device=arena.device)
    launch_part(
        _fetch_heads_kernel, 1, arena, call, timeout, epoch, heads, heads,
        HALF_BYTES=staging_of(arena).layout.half_bytes,
        HEAD_LANES=triton.next_power_of_2(regions.num_head_words),
    )  # fmt: skip
    return heads


@triton.jit(do_not_specialize=["num_rows", "first", "signature", "rank", "budget"])
def _gather_rows_kernel(
    x_ptr, facts_ptr, row_slots_ptr,  # [N, ROW_WORDS] int64, [N, FACT_WORDS] int32, [N] int64: all written
    heads_ptr, fetched_ptr,  # [W, 2 W + 1] int64, [W] int64
    num_rows, first,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, ROW_WORDS: tl.constexpr, FACT_WORDS: tl.constexpr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, LISTS: tl.constexpr, FACTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FACT_LANES: tl.constexpr,
):  # fmt: skip
    """Row `start of s + fetched[s] + i` = the token at entry i of the list of rank s for this one.

    Example: rank 0 lists tokens 0 and 1 for this rank, rank 1 its token 4 -> rows x_0[0], x_0[1], x_1[4].
    """
    rank = launched_rank(rank)
    num_rows = num_rows.to(tl.int64)
    HEAD: tl.constexpr = 2 * WORLD + 1
    if VIRTUAL:
        x_ptr += rank * num_rows * ROW_WORDS
        facts_ptr += rank * num_rows * FACT_WORDS
        row_slots_ptr += rank * num_rows
        heads_ptr += rank * WORLD * HEAD
        fetched_ptr += rank * WORLD
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        peers = tl.arange(0, LANES)
        totals = tl.load(heads_ptr + peers * HEAD + rank, mask=peers < WORLD, other=0)
        for step in tl.static_range(WORLD):
            source = (rank + step + 1) % WORLD
            count = tl.load(heads_ptr + source * HEAD + WORLD + rank)
            row = tl.sum(tl.where(peers < source, totals, 0), axis=0) + tl.load(fetched_ptr + source)
            list_ptr = pointer_to(staging_ptrs, source, half + LISTS, tl.int32) + rank * PIECE
            index = tl.program_id(0).to(tl.int64)
            # Results may have less room than comes, where nobody on the host knows the counts.
            while (index < count) & (row + index < num_rows):
                entry = tl.load(list_ptr + index).to(tl.int64)
                token = entry // WIDTH - first
                row_ptr = pointer_to(staging_ptrs, source, half + ROWS + token * ROW_WORDS * 8, tl.int64)
                copy_row(row_ptr, x_ptr + (row + index) * ROW_WORDS, ROW_WORDS, BLOCK)
                held_ptr = pointer_to(staging_ptrs, source, half + FACTS, tl.int32) + token * FACT_WORDS
                copy_facts(held_ptr, facts_ptr + (row + index) * FACT_WORDS, FACT_WORDS, FACT_LANES)
                tl.store(row_slots_ptr + row + index, entry)
                index += tl.num_programs(0)
    finish_call(page, word)


def gather_rows(
    rows: torch.Tensor,
    facts: torch.Tensor,
    row_slots: torch.Tensor,
    heads: torch.Tensor,
    fetched: torch.Tensor,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None,
    regions: DispatchRegions,
    width: int,
    first: int,
) -> None:
    """End a dispatch: fetch the rows that came for this rank in the piece that begins with token `first`.

    Args:
        rows: [N, row_nbytes / 8] int64, to write.
        facts: [N, num_facts] int32, to write.
        row_slots: [N] int64, to write: `token * width + place`.
        heads: from `fetch_heads`.
        fetched: [R] int64, rows that came from each rank in earlier pieces.
        arena: of the group.
        call: as for `stage_tokens`.
        timeout: as for `stage_tokens`.
        epoch: from `stage_tokens`.
        regions: as for `stage_tokens`.
        width: places of a token.
        first: token that the piece begins with.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    num_rows = rows.shape[-2]
    launch_part(
        _gather_rows_kernel, blocks_for(num_rows, arena), arena, call, timeout, epoch,
        rows, facts, row_slots, heads, fetched, num_rows, first,
        HALF_BYTES=staging_of(arena).layout.half_bytes, ROW_WORDS=rows.shape[-1], FACT_WORDS=facts.shape[-1],
        WIDTH=width, **_places_of(regions),
    )  # fmt: skip
    if epoch is not None:
        arena.channel.after_kernel(epoch)


def _places_of(regions: DispatchRegions) -> dict[str, Any]:
    """Constants of the kernels of a dispatch."""
    return {
        "PIECE": regions.num_tokens,
        "LISTS": regions.list_offset(0),
        "FACTS": regions.facts_offset,
        "ROWS": regions.rows_offset,
        "BLOCK": tile_for(regions.row_nbytes // 8, WORDS_A_TILE),
        "FACT_LANES": lanes_for(regions.num_facts),
    }
