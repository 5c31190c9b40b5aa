"""Loops over the tiles of a span, shared by the collectives.

A span's tile `t` belongs to program `t % num_programs` on every rank, so that what a program waits for is
the work of the same program of its peers. Full tiles are not masked: a mask whose bound is unknown would
split every 128-bit access into scalars. What is left behind the last full tile goes in small masked steps,
since scalars of a whole tile would not fit the registers. Loops are `while`, because `range` over a run-time
bound fails in the interpreter of Triton 3.6.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import INTERPRETED, accumulate, pointer_to, rounded

__all__ = ["copy_span", "reduce_span", "slice_span", "spread_span"]


@triton.jit
def slice_span(first, length, numel):
    """Elements of the slice that begins at `first`: short or none at the end of a message."""
    return tl.maximum(tl.minimum(numel - first, length), 0)


@triton.jit
def _offsets(start, numel, SIZE: tl.constexpr, FULL: tl.constexpr):
    """Offsets of a tile, and which of them count."""
    offs = start + tl.arange(0, SIZE)
    if FULL:
        return offs, tl.full((SIZE,), True, tl.int1)
    else:
        return offs, offs < numel


@triton.jit
def copy_span(src_ptr, dst_ptr, numel, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < numel."""
    TAIL: tl.constexpr = BLOCK if INTERPRETED else BLOCK // 8
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _copy_tile(src_ptr, dst_ptr, numel, tile * BLOCK, BLOCK, True)
        tile += tl.num_programs(0)
    start = tile * BLOCK
    while (start < numel) & (tile == numel // BLOCK):
        _copy_tile(src_ptr, dst_ptr, numel, start, TAIL, False)
        start += TAIL


@triton.jit
def _copy_tile(src_ptr, dst_ptr, numel, start, SIZE: tl.constexpr, FULL: tl.constexpr):
    offs, mask = _offsets(start, numel, SIZE, FULL)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=mask), mask=mask)


@triton.jit
def spread_span(
    src_ptr, dst_ptrs, dst_offset, numel, rank,
    WORLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dst_p[i] = src[i] for i < numel and every rank p, its own neighbour first."""
    TAIL: tl.constexpr = BLOCK if INTERPRETED else BLOCK // 8
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _spread_tile(src_ptr, dst_ptrs, dst_offset, numel, rank, tile * BLOCK, WORLD, BLOCK, True)
        tile += tl.num_programs(0)
    start = tile * BLOCK
    while (start < numel) & (tile == numel // BLOCK):
        _spread_tile(src_ptr, dst_ptrs, dst_offset, numel, rank, start, WORLD, TAIL, False)
        start += TAIL


@triton.jit
def _spread_tile(
    src_ptr, dst_ptrs, dst_offset, numel, rank, start,
    WORLD: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs, mask = _offsets(start, numel, SIZE, FULL)
    value = tl.load(src_ptr + offs, mask=mask)
    for step in tl.static_range(WORLD):
        peer = (rank + step + 1) % WORLD
        dst_ptr = pointer_to(dst_ptrs, peer, dst_offset, src_ptr.dtype.element_ty)
        tl.store(dst_ptr + offs, value, mask=mask)


@triton.jit
def reduce_span(
    dst_ptr, src_ptrs, first_holder, src_offset, numel,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    HOLDER_STEP: tl.constexpr, SLOT_BYTES: tl.constexpr,
):  # fmt: skip
    """dst[i] = reduction over s < WORLD, in that order, of source s at i, for i < numel.

    Source s lies `src_offset + s * SLOT_BYTES` bytes into the buffer of rank
    `first_holder + s * HOLDER_STEP`: one rank holds them all (0, SLOT_BYTES) or each its own (1, 0).
    """
    TAIL: tl.constexpr = BLOCK if INTERPRETED else BLOCK // 8
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _reduce_tile(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, tile * BLOCK,
            WORLD, BLOCK, OP, ACC, HOLDER_STEP, SLOT_BYTES, True,
        )  # fmt: skip
        tile += tl.num_programs(0)
    start = tile * BLOCK
    while (start < numel) & (tile == numel // BLOCK):
        _reduce_tile(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, start,
            WORLD, TAIL, OP, ACC, HOLDER_STEP, SLOT_BYTES, False,
        )  # fmt: skip
        start += TAIL


@triton.jit
def _reduce_tile(
    dst_ptr, src_ptrs, first_holder, src_offset, numel, start,
    WORLD: tl.constexpr, SIZE: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    HOLDER_STEP: tl.constexpr, SLOT_BYTES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    dtype = dst_ptr.dtype.element_ty
    offs, mask = _offsets(start, numel, SIZE, FULL)
    acc = tl.load(pointer_to(src_ptrs, first_holder, src_offset, dtype) + offs, mask=mask).to(ACC)
    for source in tl.static_range(1, WORLD):
        holder = first_holder + source * HOLDER_STEP
        src_ptr = pointer_to(src_ptrs, holder, src_offset + source * SLOT_BYTES, dtype)
        acc = accumulate(acc, tl.load(src_ptr + offs, mask=mask).to(ACC), OP)
    if OP == "avg":
        acc = acc * (1.0 / WORLD)
    tl.store(dst_ptr + offs, rounded(acc, dtype), mask=mask)
