"""All-reduce: out = reduction over ranks of x, the same bits on every rank.

=============  =======================  ======  ==========================================
algorithm      bytes in, per rank       rounds  wins
=============  =======================  ======  ==========================================
one_shot_ll    2 (W - 1) S              1       the smallest: data and flag in one store
one_shot_push  (W - 1) S                1       small: peers' data is local when it is reduced
one_shot_pull  (W - 1) S                1       medium, W = 2
two_shot       2 (W - 1) / W S          2       large: each element is reduced once
=============  =======================  ======  ==========================================

Needs: the same numel, dtype and op on every rank; x and out contiguous; out may be x.

Numerics: fp32, fp16 and bf16 are accumulated in fp32 in rank order and rounded once, to nearest even;
int32, int64 and fp64 in their own type. avg multiplies the sum by fp32(1/W). max and min propagate NaN.
All algorithms give the same bits for sum and avg.

Source: one-shot push and pull, two-shot: the algorithms of PyTorch symmetric memory and vLLM's custom
all-reduce, with the trailing barrier replaced by double buffering (DeepEP's argument); flag in data: NCCL's
LL protocol (Hu et al., Demystifying NCCL, 2025).

Meaning: `tcomm.reference.all_reduce`. Contract: `docs/memory-model.md`.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from tcomm.errors import CapabilityError, ConfigError
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
from tcomm.kernels.lanes import push_lanes, reduce_lanes
from tcomm.kernels.launch import grid_of, is_dense, launch, narrow_tile_of, rows_of, staging_of, tile_of
from tcomm.kernels.numerics import accumulator_of, check_reduction
from tcomm.kernels.tiles import copy_span, reduce_span, slice_span, spread_span
from tcomm.memory.base import KernelArena
from tcomm.memory.layout import cut, slice_numel
from tcomm.signature import CallDescription

__all__ = [
    "LAUNCHERS",
    "check_tensors",
    "one_shot_ll_all_reduce",
    "one_shot_pull_all_reduce",
    "one_shot_push_all_reduce",
    "two_shot_all_reduce",
]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride", "numel"]


@triton.jit(do_not_specialize=_RUNTIME)
def _one_shot_push_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]
    numel, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank writes its x into its slot of every rank, then reduces its own slots.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> slots of both ranks [1, 2] [10, 20] -> out=[11, 22] on both.
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES

    spread_span(x_ptr, staging_ptrs, half + rank * SLOT_BYTES, numel, rank, WORLD, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        reduce_span(out_ptr, staging_ptrs, rank, half, numel, WORLD, BLOCK, OP, ACC, 0, SLOT_BYTES)
    finish_call(page, word)


def one_shot_push_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Reduce x over the ranks; every rank pushes its input to every other. **Collective.**

    Args:
        x: any shape, contiguous; float32, float16, bfloat16, float64, int32 or int64.
        arena: of the group, with staging. A message longer than a slot goes in several pieces.
        op: `sum`, `avg` (floating point only), `max` or `min`.
        out: like x, contiguous; may be x itself.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.

    Returns:
        `out`, or a new tensor like x.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    staging = staging_of(arena)
    layout = staging.layout
    constants = {"HALF_BYTES": layout.half_bytes, "SLOT_BYTES": layout.slot_bytes}
    kernel = _one_shot_push_all_reduce_kernel
    return _run(kernel, "one_shot_push", layout.slot_bytes, x, arena, op, out, timeout, call, constants)


@triton.jit(do_not_specialize=_RUNTIME)
def _one_shot_pull_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]
    numel, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank stages its x at home, then reduces what all ranks staged.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> staged [1, 2] on 0, [10, 20] on 1 -> out=[11, 22] on both.
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES

    copy_span(x_ptr, pointer_to(staging_ptrs, rank, half, x_ptr.dtype.element_ty), numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        reduce_span(out_ptr, staging_ptrs, 0, half, numel, WORLD, BLOCK, OP, ACC, 1, 0)
    finish_call(page, word)


def one_shot_pull_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Reduce x over the ranks; every rank reads every other's staged input. **Collective.**

    Arguments, result and errors are those of `one_shot_push_all_reduce`; a piece may fill a whole half.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    half_bytes = staging_of(arena).layout.half_bytes
    kernel = _one_shot_pull_all_reduce_kernel
    constants = {"HALF_BYTES": half_bytes}
    return _run(kernel, "one_shot_pull", half_bytes, x, arena, op, out, timeout, call, constants)


@triton.jit(do_not_specialize=_RUNTIME)
def _two_shot_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel]
    numel, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLICE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank stages its x, reduces one slice of it over all ranks, then collects all slices.

    A slice is ceil(numel / W) rounded up to SLICE_UNIT elements; the last ones may be short or empty.
    Example (SLICE_UNIT=1): W=2, x_0=[1, 2], x_1=[10, 20] -> rank 0 reduces [11], rank 1 [22] -> [11, 22].
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

    for step in tl.static_range(WORLD):
        first = ((rank + step) % WORLD) * length
        dst_ptr = pointer_to(staging_ptrs, rank, half, dtype)
        copy_span(x_ptr + first, dst_ptr + first, slice_span(first, length, numel), BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        first = rank * length
        offset = half + first * (dtype.primitive_bitwidth // 8)
        dst_ptr = pointer_to(staging_ptrs, rank, offset, dtype)
        span = slice_span(first, length, numel)
        reduce_span(dst_ptr, staging_ptrs, 0, offset, span, WORLD, BLOCK, OP, ACC, 1, 0)
        publish(pad_ptrs, rank, 1, word, WORLD, LANES)
        if await_peers(page, 1, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
            for step in tl.static_range(WORLD):
                owner = (rank + step) % WORLD
                first = owner * length
                src_ptr = pointer_to(staging_ptrs, owner, half, dtype)
                copy_span(src_ptr + first, out_ptr + first, slice_span(first, length, numel), BLOCK)
    finish_call(page, word)


def two_shot_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Reduce x over the ranks; every rank reduces one slice for all. **Collective.**

    Arguments, result and errors are those of `one_shot_push_all_reduce`; a piece may fill a whole half.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    half_bytes = staging_of(arena).layout.half_bytes
    kernel = _two_shot_all_reduce_kernel
    constants = {"HALF_BYTES": half_bytes, "SLICE_UNIT": slice_numel(1, x.itemsize, 1)}
    return _run(kernel, "two_shot", half_bytes, x, arena, op, out, timeout, call, constants)


@triton.jit(do_not_specialize=_RUNTIME)
def _one_shot_ll_all_reduce_kernel(
    x_ptr, out_ptr, x_stride, out_stride,  # [numel], of 2 or 4 bytes an element
    numel, staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank writes (epoch, 32 bits of x) lanes into every rank; a lane arrives whole or not at all.

    The arrival word goes first and carries the signature; no data waits behind it.
    Example: W=2, epoch 7, x_0=[1, 2], x_1=[10, 20] -> lanes (7, 1) (7, 2) and (7, 10) (7, 20) -> [11, 22].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)

    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    push_lanes(x_ptr, staging_ptrs, numel, rank, word, WORLD, BLOCK, LANE_HALF_BYTES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        reduce_lanes(
            out_ptr, lane_ptr, page, numel, word, budget,
            WORLD, BLOCK, LANE_HALF_BYTES, OP, ACC, ATOMIC_POLL,
        )  # fmt: skip
    finish_call(page, word)


def one_shot_ll_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Reduce x over the ranks; flag and data travel in one 8-byte store. **Collective.**

    Arguments, result and errors are those of `one_shot_push_all_reduce`, for element types of 2 and 4
    bytes; a piece may fill a source's lanes, 4 bytes each.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: for element types of 8 bytes.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    if x.itemsize > 4:
        raise CapabilityError(f"a lane carries 32 bits; {x.dtype} has {8 * x.itemsize}")
    capacity = staging_of(arena).layout.lane_slot_bytes // 2
    kernel = _one_shot_ll_all_reduce_kernel
    return _run(kernel, "one_shot_ll", capacity, x, arena, op, out, timeout, call, {})


LAUNCHERS: dict[str, Callable[..., torch.Tensor]] = {
    "one_shot_ll": one_shot_ll_all_reduce,
    "one_shot_push": one_shot_push_all_reduce,
    "one_shot_pull": one_shot_pull_all_reduce,
    "two_shot": two_shot_all_reduce,
}
"""Launcher of each algorithm, by its name without the engine."""


def _run(
    kernel: Any,
    algorithm: str,
    capacity: int,
    x: torch.Tensor,
    arena: KernelArena,
    op: str,
    out: torch.Tensor | None,
    timeout: float | None,
    call: CallDescription | None,
    constants: dict[str, Any],
) -> torch.Tensor:
    """Check, cut into pieces that fit `capacity` bytes, and launch each as one call of the group."""
    out = torch.empty_like(x) if out is None else out
    check_tensors(x, out, op, arena)
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("all_reduce", name, tuple(x.shape), op, algorithm=f"triton:{algorithm}")
    rows, out_rows = rows_of(x, arena), rows_of(out, arena)
    # A lane is 8 bytes, and carries 4 bytes of x.
    by_lanes = kernel is _one_shot_ll_all_reduce_kernel
    per_item = 4 // x.itemsize if by_lanes else 1
    acc = accumulator_of(x.dtype)
    for start, numel in cut(rows.shape[1], x.itemsize, capacity):
        if by_lanes:
            tile = narrow_tile_of(8, triton.cdiv(numel, per_item))
        else:
            tile = tile_of(x.itemsize, numel, arena.world_size)
        num_blocks = grid_of(triton.cdiv(numel, tile * per_item), arena.max_blocks)
        launch(
            kernel, num_blocks, arena, call, timeout,
            rows[:, start : start + numel], out_rows[:, start : start + numel],
            rows.stride(0), out_rows.stride(0), numel,
            BLOCK=tile, OP=op, ACC=acc, **constants,
        )  # fmt: skip
    return out


def check_tensors(x: torch.Tensor, out: torch.Tensor, op: str, arena: KernelArena) -> None:
    """Check that kernels all-reduce x into out by op.

    Raises:
        ConfigError: when they do not.
    """
    check_reduction(x.dtype, op)
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)}, x is {x.dtype} {list(x.shape)}; they must be alike"
        )
    if not (is_dense(x, arena) and is_dense(out, arena)):
        raise ConfigError("a kernel needs contiguous x and out; call .contiguous() first")
