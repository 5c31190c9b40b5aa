"""The one-sided exchange of tokens: rows are pushed to the ranks that use them, and their results pulled.

Needs: rows of words, and a table that says where each copy goes. Regions of staging are fixed: a dispatch and
a combine take turns, so that neither half is needed (`docs/moe/one_sided.md`).

Source: FlashInfer's one-sided exchange, with places by prefix counts in place of atomics, and one launch that
publishes for all that came before it.

Meaning: `tcomm.cpu.moe_one_sided`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tcomm.kernels.device import finish_call, launched_rank, page_of, rounded, row_of
from tcomm.kernels.launch import grid_of, launch_part
from tcomm.kernels.moe_counts import open_call, take_counts
from tcomm.kernels.moe_row_tables import codes_of, copy_rows, row_constants, row_pointers, table_of
from tcomm.kernels.phases import await_ranks, open_word
from tcomm.memory.base import KernelArena
from tcomm.signature import CallDescription

__all__ = ["combine", "dispatch"]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride", "num_tokens", "runtime_max", "region"]
_Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=_RUNTIME)
def _push_payload_kernel(
    x_ptr,  # [T, ROW_WORDS] integers
    codes_ptr,  # [T, TOP_K] int32
    x_stride, num_tokens, runtime_max, region: tl.int64,
    staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, TOP_K: tl.constexpr, ROW_WORDS: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write each token's row into this rank's block of every rank that gets it. Nobody is told yet.

    Example: W=2, runtime_max=2, rank 1, x=[[7], [8]], codes [[0, -1], [1, 2]] -> block 1 of rank 0 [7, 8],
    block 1 of rank 1 [8, _].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    codes_ptr = table_of(codes_ptr, num_tokens * TOP_K, rank, VIRTUAL)
    dtype = x_ptr.dtype.element_ty
    row_bytes = ROW_WORDS * (dtype.primitive_bitwidth // 8)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < num_tokens:
        tokens = first + tl.arange(0, ROWS)
        src = tl.multiple_of(x_ptr + tokens * ROW_WORDS, UNIT)
        for entry in tl.static_range(TOP_K):
            code = tl.load(codes_ptr + tokens * TOP_K + entry, mask=tokens < num_tokens, other=-1)
            going = code >= 0
            base = tl.load(staging_ptrs + code // runtime_max, mask=going, other=0)
            place = rank * runtime_max + code % runtime_max
            dst = row_pointers(base, 2 * LANE_HALF_BYTES + region + place * row_bytes, dtype, UNIT)
            copy_rows(src, dst, going, ROW_WORDS, COLS)
        first += tl.num_programs(0) * ROWS


def dispatch(
    payloads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    routes: _Tables,
    runtime_max: int,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
) -> torch.Tensor:
    """Push a copy of each token's rows to every rank that gets it. **Collective.**

    Args:
        payloads: [T, words] each, integers, rows contiguous; of virtual ranks [W, T, words].
        offsets: where the [W, runtime_max, words] rows of each lie in the first half of every rank's staging.
        routes: [T, k] int64 rank of each copy, or -1; [T, k] int64 its place among the rows of this rank
            there; [W] int64 copies for each rank. Of virtual ranks each with a row for every rank.
        runtime_max: rows of a source.
        arena: of the group.
        call: what the ranks compare.
        timeout: seconds.

    Returns:
        [W] int64: copies from each rank; of virtual ranks [W, W].

    Raises:
        CapabilityError: when there is nothing to run it on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    codes = codes_of(routes, runtime_max)
    num_tokens, top_k = codes.shape[-2:]
    epoch: int | None = None
    for payload, offset in zip(payloads, offsets, strict=True):
        row_words = payload.shape[-1]
        if not row_words or not num_tokens:
            continue
        constants = row_constants(row_words, payload.itemsize, num_tokens)
        begun = launch_part(
            _push_payload_kernel, _blocks(num_tokens, constants["ROWS"], arena), arena, call, timeout, epoch,
            payload, codes, _stride(payload, arena), num_tokens, runtime_max, offset, TOP_K=top_k,
            **constants,
        )  # fmt: skip
        epoch = begun if epoch is None else epoch
    epoch = open_call(routes[2], arena, call, timeout, epoch)
    received = torch.empty_like(routes[2])
    take_counts(received, arena, call, timeout, epoch)
    return received


@triton.jit(do_not_specialize=_RUNTIME)
def _stage_results_kernel(
    x_ptr,  # [W, runtime_max, ROW_WORDS] integers
    received_ptr,  # [W] int64
    x_stride, runtime_max, region: tl.int64,
    staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, ROW_WORDS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Copy the rows of x that stand for a received one into this rank's staging. Nobody is told yet.

    Example: W=2, runtime_max=2, received [1, 2], x=[[[7], _], [[8], [9]]] -> staged [7, _, 8, 9].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    received_ptr = table_of(received_ptr, WORLD, rank, VIRTUAL)
    dtype = x_ptr.dtype.element_ty
    base = tl.load(staging_ptrs + rank) + 2 * LANE_HALF_BYTES + region
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < WORLD * runtime_max:
        rows = first + tl.arange(0, ROWS)
        inside = rows < WORLD * runtime_max
        count = tl.load(received_ptr + rows // runtime_max, mask=inside, other=0)
        src = tl.multiple_of(x_ptr + rows * ROW_WORDS, UNIT)
        dst = row_pointers(base, rows * (ROW_WORDS * (dtype.primitive_bitwidth // 8)), dtype, UNIT)
        copy_rows(src, dst, inside & (rows % runtime_max < count), ROW_WORDS, COLS)
        first += tl.num_programs(0) * ROWS


@triton.jit(do_not_specialize=_RUNTIME)
def _pull_sums_kernel(
    out_ptr,  # [T, ROW_WORDS] floats
    codes_ptr,  # [T, TOP_K] int32
    out_stride, num_tokens, runtime_max, region: tl.int64,
    staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, TOP_K: tl.constexpr, ROW_WORDS: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Wait for all ranks; out[t] = sum in fp32 of the staged rows that its codes name, one after another.

    Example: W=2, runtime_max=2, rank 1, codes [[2, 1]], staged on 0 [_, _, 3, 4], on 1 [_, _, 5, _] -> [[9]].
    """
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    codes_ptr = table_of(codes_ptr, num_tokens * TOP_K, rank, VIRTUAL)
    dtype = out_ptr.dtype.element_ty
    row_bytes = ROW_WORDS * (dtype.primitive_bitwidth // 8)
    first = tl.program_id(0).to(tl.int64) * ROWS
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        while first < num_tokens:
            tokens = first + tl.arange(0, ROWS)
            dst = tl.multiple_of(out_ptr + tokens * ROW_WORDS, UNIT)
            for start in tl.static_range(0, ROW_WORDS, COLS):
                cols = start + tl.arange(0, COLS)
                inside = (cols < ROW_WORDS)[None, :]
                total = tl.full((ROWS, COLS), 0.0, tl.float32)
                for entry in tl.static_range(TOP_K):
                    code = tl.load(codes_ptr + tokens * TOP_K + entry, mask=tokens < num_tokens, other=-1)
                    base = tl.load(staging_ptrs + code // runtime_max, mask=code >= 0, other=0)
                    place = rank * runtime_max + code % runtime_max
                    src = row_pointers(base, 2 * LANE_HALF_BYTES + region + place * row_bytes, dtype, UNIT)
                    mask = (code >= 0)[:, None] & inside
                    total += tl.load(src[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                mask = (tokens < num_tokens)[:, None] & inside
                tl.store(dst[:, None] + cols[None, :], rounded(total, dtype), mask=mask)
            first += tl.num_programs(0) * ROWS
    finish_call(page, word)


def combine(
    payload: torch.Tensor | None,
    out: torch.Tensor,
    offset: int,
    routes: _Tables,
    received: torch.Tensor,
    runtime_max: int,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
) -> None:
    """Add up what the ranks made of each token, in fp32 and the order of its experts. **Collective.**

    Args:
        payload: [W, runtime_max, H], what this rank made of what it got, contiguous; None: it lies in
            staging. Of virtual ranks [W, W, runtime_max, H].
        out: [T, H], is written; of virtual ranks [W, T, H].
        offset: where such rows lie in the first half of every rank's staging.
        routes: as for `dispatch`.
        received: what `dispatch` gave.
        runtime_max: as for `dispatch`.
        arena: as for `dispatch`.
        call: as for `dispatch`.
        timeout: seconds.

    Raises:
        CapabilityError: when there is nothing to run it on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    codes = codes_of(routes, runtime_max)
    num_tokens, top_k = codes.shape[-2:]
    hidden, epoch = out.shape[-1], None
    if payload is not None and payload.numel():
        words = payload.view(torch.int32 if payload.itemsize == 4 else torch.int16)
        constants = row_constants(hidden, words.itemsize, arena.world_size * runtime_max)
        blocks = _blocks(arena.world_size * runtime_max, constants["ROWS"], arena)
        epoch = launch_part(
            _stage_results_kernel, blocks, arena, call, timeout, None,
            words, received, _stride(words, arena), runtime_max, offset, **constants,
        )  # fmt: skip
    epoch = open_call(received, arena, call, timeout, epoch, counted=False)
    constants = row_constants(max(hidden, 1), out.itemsize, num_tokens)
    launch_part(
        _pull_sums_kernel, _blocks(num_tokens, constants["ROWS"], arena), arena, call, timeout, epoch,
        out, codes, _stride(out, arena), num_tokens if hidden else 0, runtime_max, offset, TOP_K=top_k,
        **constants,
    )  # fmt: skip
    if epoch is not None:
        arena.channel.after_kernel(epoch)


def _blocks(num_rows: int, rows: int, arena: KernelArena) -> int:
    return grid_of(triton.cdiv(num_rows, rows), arena.max_blocks)


def _stride(x: torch.Tensor, arena: KernelArena) -> int:
    return x.stride(0) if arena.is_virtual else 0
