"""Low-latency combine: rows go back to where their tokens came from, and are summed there.

=========  ======================================  ==============================
kernel     a program's work                        waits
=========  ======================================  ==============================
send rows  a row: into its source's slot           for nobody; publishes
sum rows   a tile of a token: all of its choices   for all owners
=========  ======================================  ==============================

Ranks that are left out get nothing, are not waited for, and add nothing to sums.

Where experts wrote into memory that all ranks read, nothing is sent but where each source's rows begin.

Numerics: w * y is summed in fp32 in the order of the choices and rounded once, to nearest even. A compiler
may fuse a product and its addition.

Source: DeepEP's low-latency combine, with slots by copy instead of by (expert, token).

Meaning and protocol: `docs/moe/low_latency.md`. Where things lie: `tcomm.memory.moe_slots`.
"""

import torch
import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.device import (
    begin_call,
    finish_call,
    launched_rank,
    page_of,
    pointer_to,
    rounded,
    row_of,
)
from tcomm.kernels.moe_row_tables import table_of
from tcomm.kernels.moe_rows import half_of
from tcomm.kernels.moe_slot_rows import copy_row, fresh_numbers, launch_of, row_block
from tcomm.kernels.phases import active_ranks, await_active, is_active, open_word, publish_last_to
from tcomm.memory.base import KernelArena, Staging
from tcomm.memory.moe_slots import LENT_SHIFT, SlotLayout
from tcomm.signature import CallDescription

__all__ = ["send_rows", "sum_rows"]

_RUNTIME = ["rank", "signature", "budget", "num_tokens", "number"]
_LENT_SHIFT = tl.constexpr(LENT_SHIFT)
_BEGIN = tl.constexpr((1 << LENT_SHIFT) - 1)
_LOW = tl.constexpr(0xFFFFFFFF)
_COMPILED_BYTES = 4096


@triton.jit(do_not_specialize=_RUNTIME)
def _send_rows_kernel(
    rows_ptr,  # [El, R * M, H]
    ranges_ptr,  # [El, R] int64, as dispatch left it
    number,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, HALF_BYTES: tl.constexpr,
    ATOMIC_POLL: tl.constexpr, VIRTUAL: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_LANES: tl.constexpr,
    SLOTS: tl.constexpr, CAPACITY: tl.constexpr, HIDDEN: tl.constexpr, ROW_BYTES: tl.constexpr,
    ROWS_AT: tl.constexpr, LENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Push each row into the slot of its copy at its source, say where rows begin, and publish.

    Example: source 0 has rows 0 of expert 0, and 0 and 1 of expert 1: they go to slots 0, 1 and 2.
    """
    rank = launched_rank(rank)
    rows_ptr = row_of(rows_ptr, EXPERTS * CAPACITY * HIDDEN, rank, VIRTUAL)
    ranges_ptr = table_of(ranges_ptr, EXPERTS * WORLD, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    active = active_ranks(page, WORLD)
    experts = tl.arange(0, EXPERT_LANES)
    for step in tl.static_range(WORLD):
        source = (rank + step + 1) % WORLD
        mask = experts < tl.where(is_active(active, source), EXPERTS, 0)
        ranges = tl.load(ranges_ptr + experts * WORLD + source, mask=mask, other=0)
        given = (ranges & _LOW).to(tl.int32)
        begins = ranges >> 32
        if not LENDS:
            ends = tl.cumsum(given, axis=0)
            shifts = begins.to(tl.int32) - (ends - given)
            num_copies = tl.sum(given, axis=0)
            slot = tl.program_id(0)
            while slot < num_copies:
                expert = tl.sum((ends <= slot).to(tl.int32), axis=0)
                line = slot + tl.sum(tl.where(experts == expert, shifts, 0), axis=0)
                src_ptr = rows_ptr + (expert.to(tl.int64) * CAPACITY + line) * HIDDEN
                offset = half + ROWS_AT + (rank * SLOTS + slot) * ROW_BYTES
                copy_row(src_ptr, pointer_to(staging_ptrs, source, offset, tl.uint8), ROW_BYTES // 4, BLOCK)
                slot += tl.num_programs(0)
        if tl.program_id(0) == 0:
            told = ((word >> 32) << 32) | (number.to(tl.int64) << _LENT_SHIFT) | begins
            words_ptr = pointer_to(staging_ptrs, source, half, tl.int64) + rank * EXPERTS
            tl.store(words_ptr + experts, told, mask=mask)
    publish_last_to(page, pad_ptrs, rank, active, 0, word, LANES)


@triton.jit
def _row_in_lent(
    words_ptr, counts_ptr, lent_ptrs, owner, expert, slot, dtype: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERT_LANES: tl.constexpr, CAPACITY: tl.constexpr, HIDDEN: tl.constexpr,
    LENT_AT: tl.constexpr, LENT_BYTES: tl.constexpr,
):  # fmt: skip
    """Where the row of a copy lies in the memory that its owner lends."""
    local = expert - owner * EXPERTS
    experts = tl.arange(0, EXPERT_LANES)
    before = tl.sum(tl.load(counts_ptr + owner * EXPERTS + experts, mask=experts < local, other=0), axis=0)
    told = tl.load(words_ptr + owner * EXPERTS + local) & _LOW
    offset = LENT_AT + (told >> _LENT_SHIFT) * LENT_BYTES
    line = (told & _BEGIN) + slot - before
    return pointer_to(lent_ptrs, owner, offset, dtype) + (local * CAPACITY + line) * HIDDEN


@triton.jit(do_not_specialize=_RUNTIME)
def _sum_rows_kernel(
    out_ptr,  # [T, H]
    idx_ptr,  # [T, k] int64
    weights_ptr,  # [T, k] float32
    slots_ptr, counts_ptr,  # as of the plan of the dispatch
    num_tokens,
    lent_ptrs,  # [W] int64, symmetric, where LENDS
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, HALF_BYTES: tl.constexpr,
    ATOMIC_POLL: tl.constexpr, VIRTUAL: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERT_LANES: tl.constexpr, SLOTS: tl.constexpr, CAPACITY: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS_AT: tl.constexpr, LENDS: tl.constexpr, LENT_AT: tl.constexpr, LENT_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Wait for all owners, and sum each token's rows, weighted.

    Example: idx [[0, 3]], weights [[0.5, 2]] -> out[0] = 0.5 * y of expert 0 + 2 * y of expert 3.
    """
    rank = launched_rank(rank)
    out_ptr = row_of(out_ptr, num_tokens * HIDDEN, rank, VIRTUAL)
    idx_ptr = table_of(idx_ptr, num_tokens * TOPK, rank, VIRTUAL)
    weights_ptr = table_of(weights_ptr, num_tokens * TOPK, rank, VIRTUAL)
    slots_ptr = table_of(slots_ptr, num_tokens * TOPK, rank, VIRTUAL)
    counts_ptr = table_of(counts_ptr, WORLD * EXPERTS, rank, VIRTUAL)
    dtype = out_ptr.dtype.element_ty
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    TILES: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    active = active_ranks(page, WORLD)
    if await_active(page, active, 0, word, budget, LANES, ATOMIC_POLL) == 0:
        words_ptr = pointer_to(staging_ptrs, rank, half, tl.int64)
        _, num_stale = fresh_numbers(words_ptr, page, word, active, LANES, EXPERTS, EXPERT_LANES)
        tile = tl.program_id(0)
        while (tile < num_tokens * TILES) & (num_stale == 0):
            token = tile // TILES
            offs = (tile % TILES) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < HIDDEN
            acc = tl.zeros((BLOCK,), tl.float32)
            for j in tl.static_range(TOPK):
                slot = tl.load(slots_ptr + token * TOPK + j)
                expert = tl.load(idx_ptr + token * TOPK + j)
                is_chosen = (slot >= 0) & (expert >= 0)
                expert = tl.where(is_chosen, expert, 0)
                owner = expert // EXPERTS
                is_chosen = is_chosen & is_active(active, owner)
                if LENDS:
                    src_ptr = _row_in_lent(
                        words_ptr, counts_ptr, lent_ptrs, owner, expert, slot, dtype,
                        EXPERTS, EXPERT_LANES, CAPACITY, HIDDEN, LENT_AT, LENT_BYTES,
                    )  # fmt: skip
                else:
                    first = pointer_to(staging_ptrs, rank, half + ROWS_AT, dtype)
                    src_ptr = first + (owner * SLOTS + slot) * HIDDEN
                weight = tl.load(weights_ptr + token * TOPK + j, mask=is_chosen, other=0.0)
                # The interpreter takes no mask made of a vector and a scalar.
                is_there = tl.full((BLOCK,), 0, tl.int32) + is_chosen.to(tl.int32) > 0
                y = tl.load(src_ptr + offs, mask=mask & is_there, other=0.0)
                acc += weight * y.to(tl.float32)
            tl.store(out_ptr + token.to(tl.int64) * HIDDEN + offs, rounded(acc, dtype), mask=mask)
            tile += tl.num_programs(0)
    finish_call(page, word)


def send_rows(
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    layout: SlotLayout,
    rows: torch.Tensor,
    ranges: torch.Tensor,
    number: int,
    lends: bool,
) -> int:
    """Begin a combine: give each source its rows back, and publish. **Collective.**

    Args:
        arena: of the group, with a staging half of `layout`; of virtual ranks tensors have a row for each.
        call: the same for both parts.
        timeout: seconds that the call may wait.
        layout: of the exchange.
        rows: [El, R * M, H], contiguous, at a multiple of 16 bytes.
        ranges: [El, R] int64, as `receive_copies` wrote it.
        number: of the result, 0 or 1.
        lends: whether `rows` lies in memory that all ranks read, so that nothing is copied.

    Returns:
        The epoch, for `sum_rows`; 0 where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run it on.
    """
    row_nbytes = layout.hidden * layout.itemsize
    send = launch_of(
        _send_rows_kernel, arena, layout, ROW_BYTES=row_nbytes, LENDS=lends, BLOCK=row_block(row_nbytes)
    )
    return send(layout.slots, call, timeout, None, rows, ranges, number) or 0


def sum_rows(
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int,
    layout: SlotLayout,
    out: torch.Tensor,
    topk_idx: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    lent: Staging | None,
) -> None:
    """End a combine: wait, and sum. **Collective.**

    Args:
        arena: as for `send_rows`.
        call: likewise.
        timeout: likewise.
        epoch: what that returned.
        layout: of the exchange.
        out: [T, H], contiguous, written.
        topk_idx: [T, k] int64, contiguous; -1 leaves a choice out.
        weights: [T, k] float32, contiguous.
        slots: [T, k] int32, as `send_copies` wrote it.
        counts: [E] int32, likewise.
        lent: memory in which the owners' rows lie, a half for each result; None: they were sent.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    topk, num_tokens = topk_idx.shape[-1], topk_idx.shape[-2]
    block = triton.next_power_of_2(layout.hidden)
    if not is_interpreted():
        block = min(block, _COMPILED_BYTES // out.itemsize)
    total = launch_of(
        _sum_rows_kernel, arena, layout, TOPK=topk, LENDS=lent is not None, BLOCK=block,
        LENT_AT=lent.layout.half(0) if lent else 0, LENT_BYTES=lent.layout.half_bytes if lent else 0,
    )  # fmt: skip
    table = arena.control.table if lent is None else lent.buffer.table
    work = num_tokens * triton.cdiv(layout.hidden, block)
    total(work, call, timeout, epoch, out, topk_idx, weights, slots, counts, num_tokens, table)
    arena.channel.after_kernel(epoch)
