"""Rows of tokens and the facts that go with them, copied one by one; shared by dispatch and combine."""

from __future__ import annotations

import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.memory.base import KernelArena

__all__ = ["WORDS_A_TILE", "blocks_for", "copy_facts", "copy_row", "half_of", "lanes_for", "tile_for"]

WORDS_A_TILE = 512
"""Of 64 bits: 16 bytes a thread."""
_INTERPRETED_BLOCKS = 2


@triton.jit
def half_of(word, LANE_HALF_BYTES: tl.constexpr, HALF_BYTES: tl.constexpr):
    """Where the half of a call begins in staging, in bytes."""
    return 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES


@triton.jit
def copy_row(src_ptr, dst_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < WORDS."""
    for start in tl.static_range(0, WORDS, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=offs < WORDS), mask=offs < WORDS)


@triton.jit
def copy_facts(src_ptr, dst_ptr, WORDS: tl.constexpr, LANES: tl.constexpr):
    """dst[i] = src[i] as int32, for i < WORDS; nothing when there are none."""
    for start in tl.static_range(0, WORDS, LANES):
        offs = start + tl.arange(0, LANES)
        value = tl.load(src_ptr + offs, mask=offs < WORDS)
        tl.store(dst_ptr + offs, value.to(tl.int32), mask=offs < WORDS)


def blocks_for(num_rows: int, arena: KernelArena) -> int:
    """Programs for so many rows. Parts of a call wait for all blocks of a rank, so ranks may differ."""
    return max(1, min(num_rows, _INTERPRETED_BLOCKS if is_interpreted() else arena.max_blocks))


def tile_for(numel: int, compiled: int) -> int:
    """Elements to handle at a time: `compiled`, or all where each operation costs a lot."""
    return lanes_for(numel) if is_interpreted() else compiled


def lanes_for(numel: int) -> int:
    """The power of two that has room for so many."""
    return 1 << (max(numel, 1) - 1).bit_length()
