"""Combine with exact sizes: rows go back to where they came from, and are added up there.

It is pushed: each row goes to the (token, place) of its source, which adds up what lies there in order. So
nobody needs to know what others return, and the cut into pieces follows from the tokens alone.

=========  ========================================  ============================================
launch     does                                      waits for
=========  ========================================  ============================================
return     rows into the halves of their sources     nobody: what was there was read two calls ago
sum        places of a token into its result         all ranks' return, and ends the call
=========  ========================================  ============================================

Needs: rows of a multiple of 16 bytes; the places that a dispatch gave. Tensors of virtual ranks have one more
dimension in front, and are contiguous.

Source: combine of DeepEP V2, whose slots are a source's too, with float32 sums in order.

Meaning: `tcomm.cpu.moe_high_throughput`, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tcomm.kernels.device import begin_call, finish_call, launched_rank, page_of, pointer_to, rounded
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
from tcomm.memory.token_regions import ReturnRegions
from tcomm.signature import CallDescription

__all__ = ["return_rows", "sum_places"]


@triton.jit(do_not_specialize=["num_rows", "first", "signature", "rank", "budget"])
def _return_rows_kernel(
    x_ptr, row_slots_ptr, weights_ptr,  # [N, ROW_WORDS] int64, [N] int64, [N, WEIGHT_WORDS] int32
    matrix_ptr,  # [W, W] int32, rows from each rank to each
    num_rows, first,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, ROW_WORDS: tl.constexpr, WEIGHT_WORDS: tl.constexpr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
    FACT_LANES: tl.constexpr,
):  # fmt: skip
    """Row n goes to place `row_slots[n]` of the rank that it came from; -1 goes nowhere.

    Example: WIDTH=2, rows from rank 1 with slots [0, 3] -> place 0 of token 0 and place 1 of token 1 there.
    """
    rank = launched_rank(rank)
    num_rows = num_rows.to(tl.int64)
    if VIRTUAL:
        x_ptr += rank * num_rows * ROW_WORDS
        row_slots_ptr += rank * num_rows
        weights_ptr += rank * num_rows * WEIGHT_WORDS
        matrix_ptr += rank * WORLD * WORLD
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    peers = tl.arange(0, LANES)
    counts = tl.load(matrix_ptr + peers * WORLD + rank, mask=peers < WORLD, other=0)
    ends = tl.where(peers < WORLD, tl.cumsum(counts, 0), 0x7FFFFFFF)

    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        place = tl.load(row_slots_ptr + row) - first * WIDTH
        if (place >= 0) & (place < PIECE * WIDTH):
            source = tl.sum((row >= ends).to(tl.int64), axis=0)
            row_ptr = pointer_to(staging_ptrs, source, half + place * ROW_WORDS * 8, tl.int64)
            copy_row(x_ptr + row * ROW_WORDS, row_ptr, ROW_WORDS, BLOCK)
            weights_at = pointer_to(staging_ptrs, source, half + WEIGHTS, tl.int32) + place * WEIGHT_WORDS
            copy_facts(weights_ptr + row * WEIGHT_WORDS, weights_at, WEIGHT_WORDS, FACT_LANES)
        row += tl.num_programs(0)
    publish_last(page, pad_ptrs, rank, 0, word, WORLD, LANES)


def return_rows(
    rows: torch.Tensor,
    row_slots: torch.Tensor,
    weights: torch.Tensor,
    matrix: torch.Tensor,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    regions: ReturnRegions,
    first: int,
) -> int | None:
    """Begin a combine: put rows back that belong to the piece that begins with token `first`. **Collective.**

    Args:
        rows: [N, row_nbytes / 8] int64.
        row_slots: [N] int64, from `gather_rows`; -1 of rows that came from nowhere.
        weights: [N, num_weights] int32, the bits of float32.
        matrix: [R, R] int32, rows from each rank to each.
        arena: of the group.
        call: what the ranks compare.
        timeout: seconds that it may wait; None: while the peers live.
        regions: the same on all ranks.
        first: token that the piece begins with.

    Returns:
        The epoch, for `sum_places`; None where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run a kernel on.
    """
    num_rows = rows.shape[-2]
    return launch_part(
        _return_rows_kernel, blocks_for(num_rows, arena), arena, call, timeout, None,
        rows, row_slots, weights, matrix, num_rows, first,
        HALF_BYTES=staging_of(arena).layout.half_bytes, ROW_WORDS=rows.shape[-1],
        WEIGHT_WORDS=weights.shape[-1], WIDTH=regions.width, PIECE=regions.num_tokens,
        WEIGHTS=regions.weights_offset, BLOCK=tile_for(rows.shape[-1], WORDS_A_TILE),
        FACT_LANES=lanes_for(weights.shape[-1]),
    )  # fmt: skip


@triton.jit
def _sum_places(
    out_ptr, held_ptr, first_term_ptr, second_term_ptr, num_places,
    NUMEL: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = sum of held[place, i] for place < num_places in order, then of the terms, for i < NUMEL."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    start = tl.full((), 0, tl.int32)
    while start < NUMEL:
        offs = start + tl.arange(0, BLOCK)
        mask = offs < NUMEL
        # A vector, since the interpreter makes no mask of a scalar.
        places = tl.where(mask, num_places, 0)
        acc = tl.load(held_ptr + offs, mask=places > 0, other=0).to(tl.float32)
        for place in tl.static_range(1, WIDTH):
            more = tl.load(held_ptr + place * NUMEL + offs, mask=places > place, other=0)
            acc += more.to(tl.float32)
        if TERMS > 0:
            acc += tl.load(first_term_ptr + offs, mask=mask, other=0).to(tl.float32)
        if TERMS > 1:
            acc += tl.load(second_term_ptr + offs, mask=mask, other=0).to(tl.float32)
        tl.store(out_ptr + offs, rounded(acc, dtype), mask=mask)
        start += BLOCK


@triton.jit(do_not_specialize=["num_tokens", "first", "signature", "rank", "budget"])
def _sum_places_kernel(
    x_ptr, weights_ptr,  # [T, HIDDEN], [T, WEIGHT_WORDS] float32: written
    slots_ptr,  # [T, W] int32
    first_term_ptr, second_term_ptr,  # [T, HIDDEN] of the dtype of x
    num_tokens, first,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, HIDDEN: tl.constexpr, WEIGHT_WORDS: tl.constexpr,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, WEIGHTS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK: tl.constexpr, FACT_LANES: tl.constexpr,
):  # fmt: skip
    """x[t] = sum in float32 of the rows at token t's places, in order, and of the terms; rounded once.

    Example: WIDTH=2, places of token 0 hold [1, 2] and [10, 20], term [100, 100] -> x[0]=[111, 122].
    """
    rank = launched_rank(rank)
    num_tokens = num_tokens.to(tl.int64)
    if VIRTUAL:
        x_ptr += rank * num_tokens * HIDDEN
        weights_ptr += rank * num_tokens * WEIGHT_WORDS
        slots_ptr += rank * num_tokens * WORLD
        first_term_ptr += rank * num_tokens * HIDDEN
        second_term_ptr += rank * num_tokens * HIDDEN
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        peers = tl.arange(0, LANES)
        token = first + tl.program_id(0).to(tl.int64)
        while token < tl.minimum(first + PIECE, num_tokens):
            slots = tl.load(slots_ptr + token * WORLD + peers, mask=peers < WORLD, other=-1)
            num_places = tl.sum((slots >= 0).to(tl.int32), axis=0)
            place = (token - first) * WIDTH
            row_bytes: tl.constexpr = HIDDEN * dtype.primitive_bitwidth // 8
            held_ptr = pointer_to(staging_ptrs, rank, half + place * row_bytes, dtype)
            at = token * HIDDEN
            _sum_places(
                x_ptr + at, held_ptr, first_term_ptr + at, second_term_ptr + at, num_places,
                HIDDEN, WIDTH, TERMS, BLOCK,
            )  # fmt: skip
            if WEIGHT_WORDS > 0:
                held_weights = (
                    pointer_to(staging_ptrs, rank, half + WEIGHTS, tl.float32) + place * WEIGHT_WORDS
                )
                out_ptr = weights_ptr + token * WEIGHT_WORDS
                _sum_places(
                    out_ptr, held_weights, out_ptr, out_ptr, num_places, WEIGHT_WORDS, WIDTH, 0, FACT_LANES
                )
            token += tl.num_programs(0)
    finish_call(page, word)


def sum_places(
    out: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    terms: Sequence[torch.Tensor],
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None,
    regions: ReturnRegions,
    first: int,
) -> None:
    """End a combine: add up what came for the tokens of the piece that begins with token `first`.

    Args:
        out: [T, H], to write.
        weights: [T, num_weights] float32, to write.
        slots: [T, R] int32, of the dispatch.
        terms: up to two of [T, H] in the dtype of out, to add.
        arena: of the group.
        call: as for `return_rows`.
        timeout: as for `return_rows`.
        epoch: from `return_rows`.
        regions: as for `return_rows`.
        first: token that the piece begins with.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    num_tokens, hidden = out.shape[-2:]
    added = [*terms, out, out][:2]
    launch_part(
        _sum_places_kernel, blocks_for(min(regions.num_tokens, num_tokens - first), arena), arena, call,
        timeout, epoch, out, weights, slots, *added, num_tokens, first,
        HALF_BYTES=staging_of(arena).layout.half_bytes, HIDDEN=hidden, WEIGHT_WORDS=weights.shape[-1],
        WIDTH=regions.width, PIECE=regions.num_tokens, WEIGHTS=regions.weights_offset, TERMS=len(terms),
        BLOCK=tile_for(hidden, 8 * WORDS_A_TILE // out.itemsize), FACT_LANES=lanes_for(weights.shape[-1]),
    )  # fmt: skip
    if epoch is not None:
        arena.channel.after_kernel(epoch)
