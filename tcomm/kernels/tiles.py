"""Loops over the tiles of a span, shared by the collectives.

A span's tile `t` belongs to program `t % num_programs` on every rank, so that what a program waits for is
the work of the same program of its peers. Full tiles are not masked: a mask whose bound is unknown would
split every 128-bit access into scalars. Loops are `while`, because `range` over a run-time bound fails in
the interpreter of Triton 3.6.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import accumulate, pointer_to, rounded

__all__ = ["copy_span", "reduce_span", "spread_span"]


@triton.jit
def _tile_offsets(tile, BLOCK: tl.constexpr):
    return tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _tile_mask(offs, numel, FULL: tl.constexpr):
    if FULL:
        return tl.full(offs.shape, True, tl.int1)
    return offs < numel


@triton.jit
def copy_span(src_ptr, dst_ptr, numel, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < numel."""
    tile = tl.program_id(0)
    while tile < numel // BLOCK:
        offs = _tile_offsets(tile, BLOCK)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs))
        tile += tl.num_programs(0)
    if tile == numel // BLOCK:
        offs = _tile_offsets(tile, BLOCK)
        mask = _tile_mask(offs, numel, False)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=mask), mask=mask)


@triton.jit
def spread_span(
    src_ptr, dst_ptrs, dst_offset, numel, rank,
    WORLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dst_p[i] = src[i] for i < numel and every rank p, its own neighbour first."""
    tile = tl.program_id(0)
    while tile < numel // BLOCK:
        _spread_tile(src_ptr, dst_ptrs, dst_offset, numel, rank, tile, WORLD, BLOCK, True)
        tile += tl.num_programs(0)
    if tile == numel // BLOCK:
        _spread_tile(src_ptr, dst_ptrs, dst_offset, numel, rank, tile, WORLD, BLOCK, False)


@triton.jit
def _spread_tile(
    src_ptr, dst_ptrs, dst_offset, numel, rank, tile,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = _tile_offsets(tile, BLOCK)
    mask = _tile_mask(offs, numel, FULL)
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
    tile = tl.program_id(0)
    while tile < numel // BLOCK:
        _reduce_tile(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, tile,
            WORLD, BLOCK, OP, ACC, HOLDER_STEP, SLOT_BYTES, True,
        )  # fmt: skip
        tile += tl.num_programs(0)
    if tile == numel // BLOCK:
        _reduce_tile(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, tile,
            WORLD, BLOCK, OP, ACC, HOLDER_STEP, SLOT_BYTES, False,
        )  # fmt: skip


@triton.jit
def _reduce_tile(
    dst_ptr, src_ptrs, first_holder, src_offset, numel, tile,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    HOLDER_STEP: tl.constexpr, SLOT_BYTES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    dtype = dst_ptr.dtype.element_ty
    offs = _tile_offsets(tile, BLOCK)
    mask = _tile_mask(offs, numel, FULL)
    acc = tl.load(pointer_to(src_ptrs, first_holder, src_offset, dtype) + offs, mask=mask).to(ACC)
    for source in tl.static_range(1, WORLD):
        holder = first_holder + source * HOLDER_STEP
        src_ptr = pointer_to(src_ptrs, holder, src_offset + source * SLOT_BYTES, dtype)
        acc = accumulate(acc, tl.load(src_ptr + offs, mask=mask).to(ACC), OP)
    if OP == "avg":
        acc = acc * (1.0 / WORLD)
    tl.store(dst_ptr + offs, rounded(acc, dtype), mask=mask)
