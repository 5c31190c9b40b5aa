"""The slot of each choice of an expert, and how often each slot was chosen: one launch, which sends nothing.

A program numbers the choices of its block by comparing all pairs, so slots follow from the input alone.
Counts of a block go to the counter by one atomic addition a slot.

Meaning: `tcomm.cpu.expert_slots`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.launch import refuse_host_memory
from tcomm.memory.expert_slots import CHOICES_A_BLOCK, GOLDEN, SHARE_BITS, SlotCounter

__all__ = ["block_constants", "choose_slots"]

_RUNTIME = [
    "num_choices", "num_counted", "topk", "num_experts", "width", "stride", "salt", "first_slot", "num_slots",
]  # fmt: skip
# A layer's row of a counter begins anywhere; no layer may need a kernel of its own in the middle of a graph.
_POINTERS = [
    "topk_ptr", "map_ptr", "count_ptr", "share_ptr", "out_ptr", "load_ptr", "unpadded_ptr", "record_ptr",
]  # fmt: skip
_GOLDEN = tl.constexpr(GOLDEN)
_LEVELS = tl.constexpr((1 << SHARE_BITS) - 1)
_COMPILED_TILE = 16
_LEAST_BINS = 32
# A thread for each choice of a block.
_NUM_WARPS = CHOICES_A_BLOCK // (32 if torch.version.hip is None else 64)


@triton.jit
def _experts_at(topk_ptr, offs, num_choices, num_experts):
    """What these choices chose; -1 for what is no expert."""
    chosen = tl.load(topk_ptr + offs, mask=offs < num_choices, other=-1)
    return tl.where((chosen >= 0) & (chosen < num_experts), chosen, -1).to(tl.int32)


@triton.jit
def _numbers_of(chosen, first, topk_ptr, num_choices, num_experts, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """How many choices of the same expert come before each one in its block."""
    offs = first + tl.arange(0, BLOCK)
    number = tl.full((BLOCK,), 0, tl.int32)
    start = first
    end = tl.minimum(first + BLOCK, num_choices)
    while start < end:
        others = start + tl.arange(0, TILE)
        other = _experts_at(topk_ptr, others, num_choices, num_experts)
        is_before = (other[:, None] == chosen[None, :]) & (others[:, None] < offs[None, :])
        number += tl.sum(is_before.to(tl.int32), axis=0)
        start += TILE
    return number


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def _choose_slots_kernel(
    topk_ptr,  # [T, k] int32 or int64
    map_ptr,  # [E, X] int64, rows `stride` apart
    count_ptr,  # [E] int64
    share_ptr,  # [E, X] int32; where HAS_SHARE
    out_ptr,  # [T, k] of the dtype of topk
    load_ptr,  # [S] int32 or int64, added to where BINS
    unpadded_ptr,  # tokens that count, one integer; where HAS_UNPADDED
    record_ptr,  # one byte; where HAS_RECORD
    num_choices, num_counted, topk, num_experts, width, stride, salt, first_slot, num_slots,
    HAS_SHARE: tl.constexpr, HAS_UNPADDED: tl.constexpr, HAS_RECORD: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Put the slots of a block of choices, and add to the counter how often each is among them.

    Example: k=2, topk=[[0, 1], [0, 2], [0, -1]], map=[[0, 3], [1, -1], [2, -1]], count=[2, 1, 1], salt=0,
    first_slot=0, load=[0, 0, 0, 7] -> out=[[0, 1], [3, 2], [0, -1]], load=[2, 1, 1, 8].
    """
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    chosen = _experts_at(topk_ptr, offs, num_choices, num_experts)
    number = _numbers_of(chosen, block * BLOCK, topk_ptr, num_choices, num_experts, BLOCK, TILE)
    expert = tl.maximum(chosen, 0)
    h = number + block + expert + salt
    count = tl.load(count_ptr + expert, mask=chosen >= 0, other=0)
    count = tl.minimum(tl.maximum(count, 0), width).to(tl.int32)
    if HAS_SHARE:
        level = (h * _GOLDEN) & _LEVELS
        place = tl.full((BLOCK,), 0, tl.int32)
        last = tl.max(count, axis=0) - 1
        at = tl.full((), 0, tl.int32)
        while at < last:
            is_inner = at < count - 1
            threshold = tl.load(share_ptr + expert * width + at, mask=is_inner, other=0)
            place += (is_inner & (level >= threshold)).to(tl.int32)
            at += 1
    else:
        place = h % tl.maximum(count, 1)
    slot = tl.load(map_ptr + expert * stride + place, mask=count > 0, other=-1).to(tl.int32)
    tl.store(out_ptr + offs, slot.to(out_ptr.dtype.element_ty), mask=offs < num_choices)
    if BINS:
        num = num_counted
        if HAS_UNPADDED:
            num = tl.minimum(tl.load(unpadded_ptr).to(tl.int32) * topk, num)
        if HAS_RECORD:
            num = tl.where(tl.load(record_ptr) != 0, num, 0)
        local = slot - first_slot
        counts = (offs < num) & (slot >= 0) & (local >= 0) & (local < num_slots)
        found = tl.histogram(tl.where(counts, local, 0), BINS, mask=counts)
        added = found.to(load_ptr.dtype.element_ty)
        tl.atomic_add(load_ptr + tl.arange(0, BINS), added, mask=found > 0, sem="relaxed")


def choose_slots(
    topk_idx: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    share: torch.Tensor | None,
    salt: int,
    out: torch.Tensor,
    counter: SlotCounter | None,
) -> None:
    """Write the slot of each choice, and count them. Not collective; allocates nothing, waits for nothing.

    Args:
        topk_idx: [T, k] int64 or int32, contiguous; what is no expert gets -1.
        logical_to_physical_map: [E, X] int64, of which rows are contiguous.
        logical_replica_count: [E] int64, contiguous; an expert without a replica gets -1.
        share: [E, X] int32 thresholds, contiguous, or None.
        salt: added to each spreading value.
        out: [T, k] of the dtype of `topk_idx`, contiguous, and not `topk_idx` itself.
        counter: what is added to, with tensors on the same device; None: nothing.

    Raises:
        CapabilityError: when there is nothing to run a kernel on.
    """
    if topk_idx.device.type == "cpu":
        refuse_host_memory()
    num_choices, topk = topk_idx.numel(), topk_idx.shape[1]
    if num_choices == 0:
        return
    num_experts, width = logical_to_physical_map.shape
    unused = logical_replica_count
    unpadded = None if counter is None else counter.num_unpadded_tokens
    record = None if counter is None else counter.should_record
    num_counted = min(max(unpadded, 0) * topk, num_choices) if isinstance(unpadded, int) else num_choices
    has_unpadded = isinstance(unpadded, torch.Tensor)
    with torch.cuda.device_of(topk_idx):
        _choose_slots_kernel[(triton.cdiv(num_choices, CHOICES_A_BLOCK),)](
            topk_idx, logical_to_physical_map, logical_replica_count, unused if share is None else share, out,
            unused if counter is None else counter.load, unpadded if has_unpadded else unused,
            unused if record is None else record.view(torch.uint8),
            num_choices, num_counted, topk, num_experts, width, logical_to_physical_map.stride(0), salt,
            0 if counter is None else counter.first_slot, 0 if counter is None else len(counter.load),
            HAS_SHARE=share is not None, HAS_UNPADDED=has_unpadded, HAS_RECORD=record is not None,
            **block_constants(0 if counter is None else len(counter.load)), num_warps=_NUM_WARPS,
        )  # fmt: skip


def block_constants(num_slots: int) -> dict[str, int]:
    """Sizes that a launch compiles in, for a counter of so many slots; 0: none."""
    return {
        "BINS": max(triton.next_power_of_2(num_slots), _LEAST_BINS) if num_slots else 0,
        "BLOCK": CHOICES_A_BLOCK,
        "TILE": CHOICES_A_BLOCK if is_interpreted() else _COMPILED_TILE,
    }
