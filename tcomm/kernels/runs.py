"""Loops over a run of elements that one program moves or reduces alone.

What goes to another node travels in one large put per program, so a program there owns a range and not every
n-th tile, as in `tiles.py`. The loops obey the same rules: whole tiles unmasked, then small masked steps.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import INTERPRETED, accumulate, pointer_to, rounded

__all__ = ["copy_run", "reduce_run"]


@triton.jit
def copy_run(src_ptr, dst_ptr, numel, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < numel."""
    TAIL: tl.constexpr = BLOCK if INTERPRETED else BLOCK // 8
    start = tl.full((), 0, tl.int64)
    while start + BLOCK <= numel:
        offs = start + tl.arange(0, BLOCK)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs))
        start += BLOCK
    while start < numel:
        offs = start + tl.arange(0, TAIL)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=offs < numel), mask=offs < numel)
        start += TAIL


@triton.jit
def reduce_run(
    dst_ptr, src_ptrs, first_holder, src_offset, numel, dtype: tl.constexpr,
    COUNT: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    HOLDER_STEP: tl.constexpr, SLOT_BYTES: tl.constexpr,
):  # fmt: skip
    """dst[i] = reduction over s < COUNT, in that order, of source s at i, over DIVISOR, for i < numel.

    Source s, of `dtype`, lies `src_offset + s * SLOT_BYTES` bytes into the buffer of rank
    `first_holder + s * HOLDER_STEP`.
    """
    TAIL: tl.constexpr = BLOCK if INTERPRETED else BLOCK // 8
    start = tl.full((), 0, tl.int64)
    while start + BLOCK <= numel:
        _reduce_step(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, start, dtype,
            COUNT, DIVISOR, BLOCK, OP, ACC, HOLDER_STEP, SLOT_BYTES, True,
        )  # fmt: skip
        start += BLOCK
    while start < numel:
        _reduce_step(
            dst_ptr, src_ptrs, first_holder, src_offset, numel, start, dtype,
            COUNT, DIVISOR, TAIL, OP, ACC, HOLDER_STEP, SLOT_BYTES, False,
        )  # fmt: skip
        start += TAIL


@triton.jit
def _reduce_step(
    dst_ptr, src_ptrs, first_holder, src_offset, numel, start, dtype: tl.constexpr,
    COUNT: tl.constexpr, DIVISOR: tl.constexpr, SIZE: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
    HOLDER_STEP: tl.constexpr, SLOT_BYTES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = start + tl.arange(0, SIZE)
    mask = tl.full((SIZE,), True, tl.int1) if FULL else offs < numel
    acc = tl.load(pointer_to(src_ptrs, first_holder, src_offset, dtype) + offs, mask=mask).to(ACC)
    for source in tl.static_range(1, COUNT):
        holder = first_holder + source * HOLDER_STEP
        src_ptr = pointer_to(src_ptrs, holder, src_offset + source * SLOT_BYTES, dtype)
        acc = accumulate(acc, tl.load(src_ptr + offs, mask=mask).to(ACC), OP)
    if DIVISOR != 1:
        acc = acc * (1.0 / DIVISOR)
    tl.store(dst_ptr + offs, rounded(acc, dst_ptr.dtype.element_ty), mask=mask)
