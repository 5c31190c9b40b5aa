"""What kernels that move rows of tokens between slots share: offsets, row copies, words, and their launch."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.device import in_set, record_late
from tcomm.kernels.launch import grid_of, launch_part, staging_of
from tcomm.memory.base import KernelArena
from tcomm.memory.moe_slots import GROUP, SlotLayout
from tcomm.signature import CallDescription

__all__ = ["copy_row", "fresh_numbers", "launch_of", "row_block"]

_WORD_BYTES = 4
_COMPILED_WORDS = 1024
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def copy_row(src_ptr, dst_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < WORDS of 32 bits, a multiple of 4; both begin at multiples of 16 bytes."""
    src_ptr = tl.multiple_of(src_ptr.to(tl.pointer_type(tl.int32)), 16)
    dst_ptr = tl.multiple_of(dst_ptr.to(tl.pointer_type(tl.int32)), 16)
    for start in tl.static_range(0, WORDS, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if start + BLOCK <= WORDS:
            tl.store(dst_ptr + offs, tl.load(src_ptr + offs))
        else:
            tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=offs < WORDS), mask=offs < WORDS)


@triton.jit
def fresh_numbers(words_ptr, page, word, active, LANES: tl.constexpr,
                  EXPERTS: tl.constexpr, EXPERT_LANES: tl.constexpr):  # fmt: skip
    """The numbers [LANES, EXPERT_LANES] that ranks told this one, and how many are not of this epoch.

    Those of ranks that are not in the set `active` are 0.
    """
    ranks = tl.arange(0, LANES)[:, None]
    experts = tl.arange(0, EXPERT_LANES)[None, :]
    there = in_set(active, LANES)[:, None] & (experts < EXPERTS)
    told = tl.load(words_ptr + ranks * EXPERTS + experts, mask=there, other=0)
    is_stale = there & ((told >> 32) != (word >> 32))
    num_stale = tl.sum(tl.sum(is_stale.to(tl.int32), axis=1), axis=0)
    if num_stale > 0:
        lanes = tl.arange(0, LANES)
        stale_ranks = tl.sum(is_stale.to(tl.int32), axis=1) > 0
        record_late(page, tl.min(tl.where(stale_ranks, lanes, LANES), axis=0), word)
    return told & _LOW, num_stale


def row_block(nbytes: int) -> int:
    """32-bit words that a program copies at a time of a row of `nbytes`."""
    return triton.next_power_of_2(nbytes // _WORD_BYTES) if is_interpreted() else _COMPILED_WORDS


def launch_of(kernel: Any, arena: KernelArena, layout: SlotLayout, **more: Any) -> Callable[..., int | None]:
    """`launch_part` of a kernel, given those constants that it takes: from the layout, and `more`.

    Returns:
        Takes the number of programs, call, timeout, epoch and the tensors.
    """
    known = {
        "HALF_BYTES": staging_of(arena).layout.half_bytes,
        "EXPERTS": layout.num_local_experts,
        "EXPERT_LANES": triton.next_power_of_2(layout.num_local_experts),
        "SLOTS": layout.slots,
        "CAPACITY": layout.capacity,
        "HIDDEN": layout.hidden,
        # The region of a source begins at the same byte whatever form its rows have.
        "SOURCE_BYTES": layout.slots * layout.hidden * layout.itemsize,
        "SOURCE_SCALES": layout.slots * (layout.hidden // GROUP),
        "ROWS_AT": layout.rows_offset,
        "SCALES_AT": layout.scales_offset,
        "INDICES_AT": layout.indices_offset,
    }
    constants = {name: value for name, value in known.items() if name in kernel.arg_names} | more

    def launch(
        work: int, call: CallDescription, timeout: float | None, epoch: int | None, *args: Any
    ) -> int | None:
        blocks = grid_of(work, arena.max_blocks)
        return launch_part(kernel, blocks, arena, call, timeout, epoch, *args, **constants)

    return launch
