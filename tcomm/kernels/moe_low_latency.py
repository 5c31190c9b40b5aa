"""Low-latency dispatch: copies are pushed into slots at the owners of their experts, and packed there.

===============  =====================================  ==============================
kernel           a program's work                       waits
===============  =====================================  ==============================
plan             the slots of one expert's copies       for nobody
send copies      a choice: its row, quantised           for nobody; publishes
receive copies   a row: to its place in the result      for all sources
===============  =====================================  ==============================

Ranks that are left out get nothing, are not waited for, and count as sources of nothing.

Numerics: quantised rows and scales have the bits of `tcomm.cpu.moe_quantise`; others are moved as they are.

Source: DeepEP's low-latency kernels, with slots numbered by the sender instead of counted by atomics.

Meaning and protocol: `docs/moe/low_latency.md`. Where things lie: `tcomm.memory.moe_slots`.
"""

import torch
import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.device import (
    begin_call,
    finish_call,
    in_set,
    launched_rank,
    page_of,
    pointer_to,
    row_of,
    started,
)
from tcomm.kernels.moe_quantise import e4m3, has_e4m3, pack_exponents, scaled_groups
from tcomm.kernels.moe_row_tables import table_of
from tcomm.kernels.moe_rows import half_of
from tcomm.kernels.moe_slot_rows import copy_row, fresh_numbers, launch_of, row_block
from tcomm.kernels.phases import active_ranks, await_active, is_active, open_word, publish_last_to
from tcomm.memory.base import KernelArena
from tcomm.memory.moe_slots import GROUP, RowFormat, SlotLayout
from tcomm.signature import CallDescription

__all__ = ["receive_copies", "send_copies"]

_RUNTIME = ["rank", "signature", "budget", "num_tokens"]
_COMPILED_GROUPS = 32
_TOKENS_AT_A_TIME = 128
_GROUP = tl.constexpr(GROUP)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit(do_not_specialize=_RUNTIME)
def _plan_kernel(
    idx_ptr,  # [T, k] int64
    slots_ptr,  # [T, k] int32, out
    counts_ptr,  # [E] int32, out
    num_tokens, staging_ptrs, pad_ptrs,
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Number the copies for each rank by (expert, token); -1 for no choice, or an expert that is none.

    Example: 4 experts on 2 ranks, idx [[0, 3], [1, -1], [0, 2]] -> slots [[0, 1], [2, -1], [1, 0]],
    counts [2, 1, 1, 1].
    """
    rank = launched_rank(rank)
    idx_ptr = table_of(idx_ptr, num_tokens * TOPK, rank, VIRTUAL)
    slots_ptr = table_of(slots_ptr, num_tokens * TOPK, rank, VIRTUAL)
    counts_ptr = table_of(counts_ptr, WORLD * EXPERTS, rank, VIRTUAL)
    expert = tl.program_id(0)
    while expert < WORLD * EXPERTS:
        first = expert // EXPERTS * EXPERTS
        before = tl.full((), 0, tl.int32)
        start = tl.full((), 0, tl.int32)
        while start < num_tokens:
            tokens = start + tl.arange(0, TOKENS)
            mask = tokens < num_tokens
            for j in tl.static_range(TOPK):
                chosen = tl.load(idx_ptr + tokens * TOPK + j, mask=mask, other=-1)
                counts = (chosen >= first) & (chosen < expert)
                for i in tl.static_range(j):
                    counts = counts & (tl.load(idx_ptr + tokens * TOPK + i, mask=mask, other=-1) != chosen)
                before += tl.sum(counts.to(tl.int32), axis=0)
            start += TOKENS
        found = tl.full((), 0, tl.int32)
        start = tl.full((), 0, tl.int32)
        while start < num_tokens:
            tokens = start + tl.arange(0, TOKENS)
            mask = tokens < num_tokens
            hits = tl.full((TOKENS,), 0, tl.int32)
            for j in tl.static_range(TOPK):
                chosen = tl.load(idx_ptr + tokens * TOPK + j, mask=mask, other=-1)
                hits = tl.where(chosen == expert, 1, hits)
            slots = before + found + tl.cumsum(hits, axis=0) - hits
            for j in tl.static_range(TOPK):
                chosen = tl.load(idx_ptr + tokens * TOPK + j, mask=mask, other=-1)
                tl.store(slots_ptr + tokens * TOPK + j, slots, mask=mask & (chosen == expert))
                if expert == 0:
                    is_none = mask & ((chosen < 0) | (chosen >= WORLD * EXPERTS))
                    tl.store(slots_ptr + tokens * TOPK + j, tl.full((TOKENS,), -1, tl.int32), mask=is_none)
            found += tl.sum(hits, axis=0)
            start += TOKENS
        tl.store(counts_ptr + expert, found)
        expert += tl.num_programs(0)


@triton.jit
def _send_quantised(
    src_ptr, row_ptr, scale_ptr,
    GROUPS: tl.constexpr, SCALE_WORDS: tl.constexpr, ROUND: tl.constexpr, UE8M0: tl.constexpr,
    BY_INSTRUCTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantise one row of GROUPS groups, TILE of them at a time."""
    row_ptr = tl.multiple_of(row_ptr.to(tl.pointer_type(tl.uint8)), 16)
    for start in tl.static_range(0, GROUPS, TILE):
        groups = start + tl.arange(0, TILE)
        offs = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        mask = (groups < GROUPS)[:, None] & (offs >= 0)
        x = tl.load(src_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        scaled, scale, exponent = scaled_groups(x, ROUND)
        tl.store(row_ptr + offs, e4m3(scaled, BY_INSTRUCTION), mask=mask)
        if UE8M0:
            words = start // 4 + tl.arange(0, TILE // 4)
            packed = pack_exponents(tl.where(groups < GROUPS, exponent, 0), TILE)
            tl.store(scale_ptr + words, packed, mask=words < SCALE_WORDS)
        else:
            tl.store(scale_ptr + groups, scale.to(tl.int32, bitcast=True), mask=groups < GROUPS)


@triton.jit(do_not_specialize=_RUNTIME)
def _send_copies_kernel(
    rows_ptr,  # [T, H]
    idx_ptr, slots_ptr, counts_ptr,  # as of the plan
    num_tokens,
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, HALF_BYTES: tl.constexpr,
    ATOMIC_POLL: tl.constexpr, VIRTUAL: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERT_LANES: tl.constexpr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_WORDS: tl.constexpr, SOURCE_BYTES: tl.constexpr, SOURCE_SCALES: tl.constexpr,
    ROWS_AT: tl.constexpr, SCALES_AT: tl.constexpr, INDICES_AT: tl.constexpr, ROUND: tl.constexpr,
    UE8M0: tl.constexpr, BY_INSTRUCTION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Put each copy into its slot at the owner of its expert, tell the owners the counts, and publish.

    Example: with the plan of above, rank 0 writes its token 1 into slot 2 of its region at rank 0.
    """
    rank = launched_rank(rank)
    rows_ptr = row_of(rows_ptr, num_tokens * HIDDEN, rank, VIRTUAL)
    idx_ptr = table_of(idx_ptr, num_tokens * TOPK, rank, VIRTUAL)
    slots_ptr = table_of(slots_ptr, num_tokens * TOPK, rank, VIRTUAL)
    counts_ptr = table_of(counts_ptr, WORLD * EXPERTS, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    active = active_ranks(page, WORLD)
    choice = tl.program_id(0)
    while choice < num_tokens * TOPK:
        slot = tl.load(slots_ptr + choice)
        owner = tl.where(slot >= 0, tl.load(idx_ptr + choice) // EXPERTS, 0)
        if (slot >= 0) & is_active(active, owner):
            token = choice // TOPK
            offset = half + ROWS_AT + rank * SOURCE_BYTES + slot * ROW_BYTES
            row_ptr = pointer_to(staging_ptrs, owner, offset, tl.uint8)
            src_ptr = rows_ptr + token.to(tl.int64) * HIDDEN
            if SCALE_WORDS:
                scales_ptr = pointer_to(staging_ptrs, owner, half + SCALES_AT, tl.int32)
                scales_ptr += rank * SOURCE_SCALES + slot * SCALE_WORDS
                _send_quantised(
                    src_ptr, row_ptr, scales_ptr,
                    HIDDEN // _GROUP, SCALE_WORDS, ROUND, UE8M0, BY_INSTRUCTION, TILE,
                )  # fmt: skip
            else:
                copy_row(src_ptr, row_ptr, ROW_BYTES // 4, BLOCK)
            indices_ptr = pointer_to(staging_ptrs, owner, half + INDICES_AT, tl.int32)
            tl.store(indices_ptr + rank * SLOTS + slot, token)
        choice += tl.num_programs(0)
    if tl.program_id(0) == 0:
        experts = tl.arange(0, EXPERT_LANES)
        for step in tl.static_range(WORLD):
            peer = (rank + step + 1) % WORLD
            mask = experts < tl.where(is_active(active, peer), EXPERTS, 0)
            counts = tl.load(counts_ptr + peer * EXPERTS + experts, mask=mask, other=0).to(tl.int64)
            words_ptr = pointer_to(staging_ptrs, peer, half, tl.int64) + rank * EXPERTS
            tl.store(words_ptr + experts, ((word >> 32) << 32) | counts, mask=mask)
    publish_last_to(page, pad_ptrs, rank, active, 0, word, LANES)


@triton.jit
def _receive_from(
    source, counts, begins, half, rank, staging_ptrs, rows_ptr, scales_ptr, info_ptr,
    LANES: tl.constexpr, EXPERT_LANES: tl.constexpr, SLOTS: tl.constexpr, CAPACITY: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_WORDS: tl.constexpr, SCALE_LANES: tl.constexpr,
    SOURCE_BYTES: tl.constexpr, SOURCE_SCALES: tl.constexpr,
    ROWS_AT: tl.constexpr, SCALES_AT: tl.constexpr, INDICES_AT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put this program's share of one source's copies where they belong."""
    is_source = (tl.arange(0, LANES) == source)[:, None]
    given = tl.sum(tl.where(is_source, counts, 0), axis=0)
    ends = tl.cumsum(given, axis=0)
    shifts = tl.sum(tl.where(is_source, begins, 0), axis=0) - (ends - given)
    experts = tl.arange(0, EXPERT_LANES)
    num_copies = tl.sum(given, axis=0)
    slot = tl.program_id(0)
    while slot < num_copies:
        expert = tl.sum((ends <= slot).to(tl.int32), axis=0)
        line = slot + tl.sum(tl.where(experts == expert, shifts, 0), axis=0)
        row = expert.to(tl.int64) * CAPACITY + line
        offset = half + ROWS_AT + source * SOURCE_BYTES + slot.to(tl.int64) * ROW_BYTES
        src_ptr = pointer_to(staging_ptrs, rank, offset, tl.uint8)
        copy_row(src_ptr, rows_ptr + row * (ROW_BYTES // 4), ROW_BYTES // 4, BLOCK)
        if SCALE_WORDS:
            words = tl.arange(0, SCALE_LANES)
            given_ptr = pointer_to(staging_ptrs, rank, half + SCALES_AT, tl.int32)
            given_ptr += source * SOURCE_SCALES + slot * SCALE_WORDS
            scales = tl.load(given_ptr + words, mask=words < SCALE_WORDS, other=0)
            dst_ptr = scales_ptr + expert.to(tl.int64) * (SCALE_WORDS * CAPACITY) + line
            tl.store(dst_ptr + words * CAPACITY, scales, mask=words < SCALE_WORDS)
        indices_ptr = pointer_to(staging_ptrs, rank, half + INDICES_AT, tl.int32)
        tl.store(info_ptr + row, tl.load(indices_ptr + source * SLOTS + slot))
        slot += tl.num_programs(0)


@triton.jit(do_not_specialize=_RUNTIME)
def _receive_copies_kernel(
    rows_ptr,  # [El, R * M] rows of ROW_BYTES, as int32, out
    scales_ptr,  # [El, SCALE_WORDS, R * M] int32, out
    info_ptr,  # [El, R * M] int32, out
    ranges_ptr,  # [El, R] int64, out
    received_ptr,  # [El] int32, out
    stats_ptr,  # [El] int32, added to where HAS_STATS
    waits_ptr,  # [R] int64, added to for sources that take part where HAS_WAITS
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, HALF_BYTES: tl.constexpr,
    ATOMIC_POLL: tl.constexpr, VIRTUAL: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_LANES: tl.constexpr,
    SLOTS: tl.constexpr, CAPACITY: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_WORDS: tl.constexpr,
    SCALE_LANES: tl.constexpr, SOURCE_BYTES: tl.constexpr, SOURCE_SCALES: tl.constexpr,
    ROWS_AT: tl.constexpr, SCALES_AT: tl.constexpr, INDICES_AT: tl.constexpr,
    HAS_STATS: tl.constexpr, HAS_WAITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Wait for all sources, and pack their copies by (expert, source, token).

    Example: 2 sources gave 1 and 2 copies for expert 0, and 2 and 0 for expert 1 -> rows of expert 0
    [slot 0 of source 0, slots 0 and 1 of source 1], of expert 1 [slots 1 and 2 of source 0].
    """
    rank = launched_rank(rank)
    rows_ptr = row_of(rows_ptr, EXPERTS * CAPACITY * (ROW_BYTES // 4), rank, VIRTUAL)
    scales_ptr = table_of(scales_ptr, EXPERTS * SCALE_WORDS * CAPACITY, rank, VIRTUAL)
    info_ptr = table_of(info_ptr, EXPERTS * CAPACITY, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = half_of(word, LANE_HALF_BYTES, HALF_BYTES)
    active = active_ranks(page, WORLD)
    since = started(ATOMIC_POLL)
    if await_active(page, active, 0, word, budget, LANES, ATOMIC_POLL) == 0:
        waited = (started(ATOMIC_POLL) - since) // 1000
        words_ptr = pointer_to(staging_ptrs, rank, half, tl.int64)
        told, num_stale = fresh_numbers(words_ptr, page, word, active, LANES, EXPERTS, EXPERT_LANES)
        if num_stale == 0:
            counts = told.to(tl.int32)
            begins = tl.cumsum(counts, axis=0) - counts
            for source in tl.static_range(WORLD):
                _receive_from(
                    source, counts, begins, half, rank, staging_ptrs, rows_ptr, scales_ptr, info_ptr,
                    LANES, EXPERT_LANES, SLOTS, CAPACITY, ROW_BYTES, SCALE_WORDS, SCALE_LANES,
                    SOURCE_BYTES, SOURCE_SCALES, ROWS_AT, SCALES_AT, INDICES_AT, BLOCK,
                )  # fmt: skip
            if tl.program_id(0) == 0:
                ranks = tl.arange(0, LANES)
                experts = tl.arange(0, EXPERT_LANES)
                there = (ranks < WORLD)[:, None] & (experts < EXPERTS)[None, :]
                offs = experts[None, :] * WORLD + ranks[:, None]
                ranges_ptr = table_of(ranges_ptr, EXPERTS * WORLD, rank, VIRTUAL)
                tl.store(ranges_ptr + offs, (begins.to(tl.int64) << 32) | told, mask=there)
                received = tl.sum(counts, axis=0)
                at = table_of(experts, EXPERTS, rank, VIRTUAL)
                tl.store(received_ptr + at, received, mask=experts < EXPERTS)
                if HAS_STATS:
                    before = tl.load(stats_ptr + at, mask=experts < EXPERTS, other=0)
                    tl.store(stats_ptr + at, before + received, mask=experts < EXPERTS)
                if HAS_WAITS:
                    others = in_set(active, LANES) & (ranks != rank)
                    waits_at = table_of(waits_ptr, WORLD, rank, VIRTUAL) + ranks
                    tl.store(waits_at, tl.load(waits_at, mask=others, other=0) + waited, mask=others)
    finish_call(page, word)


def send_copies(
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    layout: SlotLayout,
    form: RowFormat,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
) -> int:
    """Begin a dispatch: number the copies, push them, and publish. **Collective.**

    Of virtual ranks every tensor has a row for each, in front.

    Args:
        arena: of the group, with a staging half of `layout`.
        call: the same for both parts.
        timeout: seconds that the call may wait.
        layout: of the exchange.
        form: of the copies.
        x: [T, H], contiguous, at a multiple of 16 bytes.
        topk_idx: [T, k] int64, contiguous.
        slots: [T, k] int32, written: the slot of each choice's copy, or -1.
        counts: [E] int32, written: copies for each expert.

    Returns:
        The epoch, for `receive_copies`; 0 where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run it on.
    """
    topk, num_tokens = topk_idx.shape[-1], topk_idx.shape[-2]
    plan = launch_of(_plan_kernel, arena, layout, TOPK=topk, TOKENS=_TOKENS_AT_A_TIME)
    epoch = plan(counts.shape[-1], call, timeout, None, topk_idx, slots, counts, num_tokens)
    groups = triton.next_power_of_2(max(layout.hidden // GROUP, 4))
    send = launch_of(
        _send_copies_kernel, arena, layout, TOPK=topk, ROW_BYTES=form.row_nbytes,
        SCALE_WORDS=form.num_scale_words, ROUND=form.round_scale, UE8M0=form.use_ue8m0,
        BY_INSTRUCTION=has_e4m3(arena.device), BLOCK=row_block(form.row_nbytes),
        TILE=groups if is_interpreted() else min(groups, _COMPILED_GROUPS),
    )  # fmt: skip
    send(num_tokens * topk, call, timeout, epoch, x, topk_idx, slots, counts, num_tokens)
    return epoch or 0


def receive_copies(
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int,
    layout: SlotLayout,
    form: RowFormat,
    rows: torch.Tensor,
    scales: torch.Tensor,
    src_info: torch.Tensor,
    ranges: torch.Tensor,
    counts: torch.Tensor,
    recv_stats: torch.Tensor | None,
    wait_stats: torch.Tensor | None,
) -> None:
    """End a dispatch: wait, and pack. **Collective.**

    Args:
        arena: as for `send_copies`.
        call: likewise.
        timeout: likewise.
        epoch: what that returned.
        layout: of the exchange.
        form: of the copies.
        rows: [El * R * M * row words] int32, written.
        scales: [El * scale words * R * M] int32, written.
        src_info: [El, R * M] int32, written.
        ranges: [El, R] int64, written.
        counts: [El] int32, written.
        recv_stats: [El] int32, or None.
        wait_stats: [R] int64, or None; the interpreter adds nothing.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    receive = launch_of(
        _receive_copies_kernel, arena, layout, ROW_BYTES=form.row_nbytes, SCALE_WORDS=form.num_scale_words,
        SCALE_LANES=triton.next_power_of_2(max(form.num_scale_words, 1)),
        HAS_STATS=recv_stats is not None, HAS_WAITS=wait_stats is not None, BLOCK=row_block(form.row_nbytes),
    )  # fmt: skip
    receive(
        layout.slots, call, timeout, epoch, rows, scales, src_info, ranges, counts,
        counts if recv_stats is None else recv_stats, ranges if wait_stats is None else wait_stats,
    )  # fmt: skip
    arena.channel.after_kernel(epoch)
