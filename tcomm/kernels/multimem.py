"""All-reduce, all-gather and reduce-scatter by the switch: multimem instructions on a multicast address.

==============  ==================  ======================  ======  ======================================
verb            algorithm           bytes in, per rank      rounds  meant for; none has been measured yet
==============  ==================  ======================  ======  ======================================
all-reduce      multimem_one_shot   S, summed on the way    1       small
all-reduce      multimem_two_shot   (1 + 1 / W) S           2       large: each element is summed once
all-gather      multimem            (W - 1) parts, sends 1  1       all sizes: each part is sent once
reduce-scatter  multimem            1 part, summed          1       all sizes
==============  ==================  ======================  ======  ======================================

Needs: GPUs of sm_90 or later behind a switch that has multicast for the group: `Staging.multicast`, which is
the kernels' `multicast_ptr`; the same numel, dtype and op on every rank; x and out contiguous.

Numerics: sum of float32, float16 and bfloat16; avg of float32 only, times fp32(1/W), since a 16-bit sum comes
rounded from the switch and an average would be rounded twice. 16-bit types are added in fp32. The switch
settles in which order the ranks are added: the bits need not be those of other algorithms, nor the same from
run to run. In one-shot nothing promises that ranks see the same bits of one sum; in two-shot each element
has one producer, so all ranks get the same bits. The all-gather moves any dtype.

Source: the multimem collectives of PyTorch symmetric memory and NCCL's NVLS kernels, with the trailing
barrier replaced by double buffering (DeepEP's argument).

Meaning: `tcomm.reference`, up to the order of additions. Contract: section 12 of `docs/memory-model.md`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tcomm.kernels.all_reduce import check_tensors
from tcomm.kernels.device import (
    await_peers,
    begin_call,
    finish_call,
    launched_rank,
    page_of,
    pointer_to,
    publish,
    row_of,
)
from tcomm.kernels.device_cuda import alias_fence
from tcomm.kernels.launch import grid_of, launch, multicast_staging_of, rows_of, tile_numel
from tcomm.kernels.multicast import multicast_span, restage_sums, stage_span, sum_span
from tcomm.kernels.numerics import check_switch_sum
from tcomm.kernels.partition import as_small_words, each_rank, equal_part, part_from, part_table, part_to
from tcomm.kernels.tiles import copy_span, slice_span
from tcomm.memory.base import KernelArena
from tcomm.memory.layout import cut, exchange_pieces, slice_numel
from tcomm.parts import Parts
from tcomm.signature import CallDescription

__all__ = [
    "LAUNCHERS",
    "multimem_all_gather",
    "multimem_one_shot_all_reduce",
    "multimem_reduce_scatter",
    "multimem_two_shot_all_reduce",
]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride", "numel", "multicast_ptr"]


@triton.jit(do_not_specialize=_RUNTIME)
def _multimem_one_shot_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]
    numel, multicast_ptr: tl.int64, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Every rank stages its x at home, then loads the sum of what all ranks staged.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> staged [1, 2] on 0, [10, 20] on 1 -> out=[11, 22] on both.
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES

    stage_span(x_ptr, pointer_to(staging_ptrs, rank, half, x_ptr.dtype.element_ty), numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        alias_fence()
        sum_span(multicast_ptr + half, out_ptr, numel, WORLD, BLOCK, OP)
    finish_call(page, word)


def multimem_one_shot_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Sum x over the ranks; every rank loads all sums from the switch. **Collective.**

    Args:
        x: any shape, contiguous; float32, float16 or bfloat16.
        arena: of the group, with multicast staging. A message longer than a half goes in several pieces.
        op: `sum`, or of float32 `avg`.
        out: like x, contiguous; may be x itself.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.

    Returns:
        `out`, or a new tensor like x.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when the group has no multicast, or the switch does not reduce so; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    kernel = _multimem_one_shot_all_reduce_kernel
    return _all_reduce(kernel, "multimem_one_shot", x, arena, op, out, timeout, call, {})


@triton.jit(do_not_specialize=_RUNTIME)
def _multimem_two_shot_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]
    numel, multicast_ptr: tl.int64, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLICE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
    OP: tl.constexpr,
):  # fmt: skip
    """Every rank stages its x, sums one slice of it over all ranks for all ranks, then takes all at home.

    A slice is ceil(numel / W) rounded up to SLICE_UNIT elements; the last ones may be short or empty.
    Example (SLICE_UNIT=1): W=2, x_0=[1, 2], x_1=[10, 20] -> rank 0 stores 11 first, rank 1 stores 22 second,
    in the halves of both: staged [11, 22] on 0 and on 1 -> out=[11, 22] on both.
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    dtype = x_ptr.dtype.element_ty
    length = tl.cdiv(tl.cdiv(numel, WORLD), SLICE_UNIT).to(tl.int64) * SLICE_UNIT
    own_ptr = pointer_to(staging_ptrs, rank, half, dtype)

    for step in tl.static_range(WORLD):
        first = ((rank + step) % WORLD) * length
        stage_span(x_ptr + first, own_ptr + first, slice_span(first, length, numel), BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        alias_fence()
        first = rank * length
        address = multicast_ptr + half + first * (dtype.primitive_bitwidth // 8)
        restage_sums(address, slice_span(first, length, numel), dtype, WORLD, BLOCK, OP)
        publish(pad_ptrs, rank, 1, word, WORLD, LANES)
        if await_peers(page, 1, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
            alias_fence()
            for step in tl.static_range(WORLD):
                first = ((rank + step) % WORLD) * length
                copy_span(own_ptr + first, out_ptr + first, slice_span(first, length, numel), BLOCK)
    finish_call(page, word)


def multimem_two_shot_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Sum x over the ranks; every rank sums one slice and stores it to all. **Collective.**

    Arguments, result and errors are those of `multimem_one_shot_all_reduce`; all ranks get the same bits.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when the group has no multicast, or the switch does not reduce so; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    kernel = _multimem_two_shot_all_reduce_kernel
    constants = {"SLICE_UNIT": slice_numel(1, x.itemsize, 1)}
    return _all_reduce(kernel, "multimem_two_shot", x, arena, op, out, timeout, call, constants)


@triton.jit(do_not_specialize=[*_RUNTIME, "part_units"])
def _multimem_all_gather_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]; [W, part_units * UNIT]
    numel, part_units: tl.int64,
    multicast_ptr: tl.int64, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank stores its x once, into its slot of all ranks, which copy all slots to out.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> slots of both ranks [1, 2] [10, 20] -> out=[1, 2, 10, 20].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES

    multicast_span(x_ptr, multicast_ptr + half + rank * SLOT_BYTES, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        alias_fence()
        for source in tl.static_range(WORLD):
            src_ptr = pointer_to(staging_ptrs, rank, half + source * SLOT_BYTES, x_ptr.dtype.element_ty)
            copy_span(src_ptr, out_ptr + source * part_units * UNIT, numel, BLOCK)
    finish_call(page, word)


def multimem_all_gather(
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts,
    *,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
    piece_nbytes: int = 0,
) -> torch.Tensor:
    """Put the x of all ranks together; every rank stores its own to all at once. **Collective.**

    Args:
        x: what this rank gives, contiguous; any dtype.
        out: what all give, in rank order, contiguous, of the dtype of x.
        arena: of the group, with multicast staging. A part longer than a slot goes in several pieces.
        parts: one range of equal length for each rank, as `gather_parts` makes it of equal sizes.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.
        piece_nbytes: bytes of a part in a piece, at most; 0: as many as fit. The same on every rank.

    Returns:
        `out`.

    Raises:
        CapabilityError: when the group has no multicast, or the parts differ in length; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    staging = multicast_staging_of(arena)
    numel = equal_part(parts)
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("all_gather", name, (numel,), algorithm="triton:multimem")
    words, out_words = as_small_words(rows_of(x, arena)), as_small_words(rows_of(out, arena))
    size, tile, slot_bytes = words.itemsize, tile_numel(words.itemsize), staging.layout.slot_bytes
    part = numel * x.itemsize // size
    unit = 16 // size if part * size % 16 == 0 else 1
    for start, length in cut(part, size, min(slot_bytes, piece_nbytes or slot_bytes)):
        launch(
            _multimem_all_gather_kernel, grid_of(triton.cdiv(length, tile)), arena, call, timeout,
            words[:, start : start + length], out_words[:, start:],
            words.stride(0), out_words.stride(0), length, part // unit, staging.multicast,
            HALF_BYTES=staging.layout.half_bytes, SLOT_BYTES=slot_bytes, UNIT=unit, BLOCK=tile,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=_RUNTIME)
def _multimem_reduce_scatter_kernel(
    x_ptr, out_ptr, x_stride, out_stride,
    parts_ptr,  # [4, W] int64, see part_table
    multicast_ptr: tl.int64, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Every rank stages the parts of x at home; each loads the sum of what all ranks staged for it.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> staged [1] [2] on 0, [10] [20] on 1 -> out_0=[11], out_1=[22].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    parts_ptr = row_of(parts_ptr, 4 * WORLD, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES

    for step in tl.static_range(WORLD):
        peer = (rank + step + 1) % WORLD
        first, numel = part_to(parts_ptr, peer, WORLD, UNIT)
        dst_ptr = pointer_to(staging_ptrs, rank, half + peer * SLOT_BYTES, x_ptr.dtype.element_ty)
        stage_span(x_ptr + first, dst_ptr, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        alias_fence()
        first, numel = part_from(parts_ptr, rank, WORLD, UNIT)
        address = multicast_ptr + half + rank * SLOT_BYTES
        sum_span(address, out_ptr + first, numel, WORLD, BLOCK, OP)
    finish_call(page, word)


def multimem_reduce_scatter(
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts | Sequence[Parts],
    op: str = "sum",
    *,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
    piece_nbytes: int = 0,
) -> torch.Tensor:
    """Sum each rank's part of x over the ranks; every rank loads its sums from the switch. **Collective.**

    Args:
        x: all parts, contiguous; float32, float16 or bfloat16.
        out: this rank's part, contiguous, of the dtype of x.
        arena: of the group, with multicast staging. A part longer than a slot goes in several pieces.
        parts: which part is whose, in elements, as `scatter_parts` makes it; all ranks' must fit together.
        op: `sum`, or of float32 `avg`.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.
        piece_nbytes: bytes of a part in a piece, at most; 0: as many as fit. The same on every rank.

    Returns:
        `out`.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when the group has no multicast, or the switch does not reduce so; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    staging = multicast_staging_of(arena)
    check_switch_sum(x.dtype, op)
    layout, tile = staging.layout, tile_numel(x.itemsize)
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("reduce_scatter", name, reduce=op, algorithm="triton:multimem")
    rows, out_rows = rows_of(x, arena), rows_of(out, arena)
    tables = [
        exchange_pieces("pull", layout, one.scaled(x.itemsize), piece_nbytes) for one in each_rank(parts)
    ]
    for pieces in zip(*tables, strict=True):
        table, unit = part_table(pieces, x.itemsize, arena)
        num_blocks = grid_of(triton.cdiv(pieces[0].longest, tile * x.itemsize))
        launch(
            _multimem_reduce_scatter_kernel, num_blocks, arena, call, timeout,
            rows, out_rows, rows.stride(0), out_rows.stride(0), table, staging.multicast,
            HALF_BYTES=layout.half_bytes, SLOT_BYTES=layout.slot_bytes, UNIT=unit, BLOCK=tile, OP=op,
        )  # fmt: skip
    return out


LAUNCHERS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "all_reduce": {
        "multimem_one_shot": multimem_one_shot_all_reduce,
        "multimem_two_shot": multimem_two_shot_all_reduce,
    },
    "all_gather": {"multimem": multimem_all_gather},
    "reduce_scatter": {"multimem": multimem_reduce_scatter},
}
"""Launcher of each algorithm, by verb and by its name without the engine."""


def _all_reduce(
    kernel: Any,
    algorithm: str,
    x: torch.Tensor,
    arena: KernelArena,
    op: str,
    out: torch.Tensor | None,
    timeout: float | None,
    call: CallDescription | None,
    constants: dict[str, Any],
) -> torch.Tensor:
    """Check, cut into pieces that fit a half, and launch each as one call of the group."""
    staging = multicast_staging_of(arena)
    out = torch.empty_like(x) if out is None else out
    check_tensors(x, out, op, arena)
    check_switch_sum(x.dtype, op)
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("all_reduce", name, tuple(x.shape), op, algorithm=f"triton:{algorithm}")
    rows, out_rows = rows_of(x, arena), rows_of(out, arena)
    tile, half_bytes = tile_numel(x.itemsize), staging.layout.half_bytes
    for start, numel in cut(rows.shape[1], x.itemsize, half_bytes):
        launch(
            kernel, grid_of(triton.cdiv(numel, tile)), arena, call, timeout,
            rows[:, start : start + numel], out_rows[:, start : start + numel],
            rows.stride(0), out_rows.stride(0), numel, staging.multicast,
            HALF_BYTES=half_bytes, BLOCK=tile, OP=op, **constants,
        )  # fmt: skip
    return out
