"""Reduce-scatter and reduce: out = reduction over ranks of the part of x that is this rank's.

=========  =====================  ======  ================================================
algorithm  bytes in, per rank     rounds  wins
=========  =====================  ======  ================================================
push       (W - 1) parts          1       small: peers' data is local when it is reduced
pull       (W - 1) parts          1       large: nothing is written across ranks
=========  =====================  ======  ================================================

Which part is whose is a table (`tcomm.parts`): equal ones, unequal ones, or all of x for one root.

Needs: tables of all ranks that fit together, one dtype and op; x and out contiguous.

Numerics: as all-reduce: fp32, fp16 and bf16 are accumulated in fp32 in rank order and rounded once, to
nearest even; int32, int64 and fp64 in their own type. The parts, put together, are the bits of an all-reduce.

Source: the first half of the two-shot all-reduce of PyTorch symmetric memory and vLLM; pushed slots as in
Triton-distributed, with the barrier before their reuse replaced by double buffering.

Meaning: `tcomm.reference.reduce_scatter`. Contract: `docs/memory-model.md`.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

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
from tcomm.kernels.launch import grid_of, launch, rows_of, staging_of, tile_of
from tcomm.kernels.numerics import accumulator_of, check_reduction
from tcomm.kernels.partition import each_rank, part_from, part_table, part_to
from tcomm.kernels.tiles import copy_span, reduce_span
from tcomm.memory.base import KernelArena
from tcomm.memory.layout import exchange_pieces
from tcomm.parts import Parts
from tcomm.signature import CallDescription

__all__ = ["LAUNCHERS", "pull_reduce_scatter", "push_reduce_scatter"]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride"]


@triton.jit(do_not_specialize=_RUNTIME)
def _push_reduce_scatter_kernel(
    x_ptr, out_ptr, x_stride, out_stride,
    parts_ptr,  # [4, W] int64, see part_table
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank writes each part of x into its slot of the rank whose part it is, which reduces its slots.

    Example: W=2, x_0=[1, 2], x_1=[10, 20] -> slots of rank 0 [1] [10], of rank 1 [2] [20]
    -> out_0=[11], out_1=[22].
    """
    rank = launched_rank(rank)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    parts_ptr = row_of(parts_ptr, 4 * WORLD, rank, VIRTUAL)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    dtype = x_ptr.dtype.element_ty

    for step in tl.static_range(WORLD):
        peer = (rank + step + 1) % WORLD
        first, numel = part_to(parts_ptr, peer, WORLD, UNIT)
        dst_ptr = pointer_to(staging_ptrs, peer, half + rank * SLOT_BYTES, dtype)
        copy_span(x_ptr + first, dst_ptr, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        first, numel = part_from(parts_ptr, rank, WORLD, UNIT)
        reduce_span(
            out_ptr + first, staging_ptrs, rank, half, numel, WORLD, BLOCK, OP, ACC, 0, SLOT_BYTES,
        )  # fmt: skip
    finish_call(page, word)


def push_reduce_scatter(
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
    """Reduce each rank's part of x over the ranks; every rank pushes the parts of others. **Collective.**

    Args:
        x: all parts, contiguous; float32, float16, bfloat16, float64, int32 or int64.
        out: this rank's part, contiguous, of the dtype of x.
        arena: of the group, with staging. A part longer than a slot goes in several pieces.
        parts: which part is whose, in elements, as `scatter_parts` makes it; all ranks' must fit together.
        op: `sum`, `avg` (floating point only), `max` or `min`.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.
        piece_nbytes: bytes of a part in a piece, at most; 0: as many as fit. The same on every rank.

    Returns:
        `out`.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    return _run("push", x, out, arena, parts, op, timeout, call, piece_nbytes)


@triton.jit(do_not_specialize=_RUNTIME)
def _pull_reduce_scatter_kernel(
    x_ptr, out_ptr, x_stride, out_stride,
    parts_ptr,  # [4, W] int64, see part_table
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every rank stages the parts of x at home; each reduces what all ranks staged for it.

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
    dtype = x_ptr.dtype.element_ty

    for step in tl.static_range(WORLD):
        peer = (rank + step + 1) % WORLD
        first, numel = part_to(parts_ptr, peer, WORLD, UNIT)
        dst_ptr = pointer_to(staging_ptrs, rank, half + peer * SLOT_BYTES, dtype)
        copy_span(x_ptr + first, dst_ptr, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        first, numel = part_from(parts_ptr, rank, WORLD, UNIT)
        offset = half + rank * SLOT_BYTES
        reduce_span(out_ptr + first, staging_ptrs, 0, offset, numel, WORLD, BLOCK, OP, ACC, 1, 0)
    finish_call(page, word)


def pull_reduce_scatter(
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
    """Reduce each rank's part of x over the ranks; every rank reads what others staged. **Collective.**

    Arguments, result and errors are those of `push_reduce_scatter`.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    return _run("pull", x, out, arena, parts, op, timeout, call, piece_nbytes)


LAUNCHERS: dict[str, Callable[..., torch.Tensor]] = {
    "push": push_reduce_scatter,
    "pull": pull_reduce_scatter,
}
"""Launcher of each algorithm, by its name without the engine."""

_KERNELS = {"push": _push_reduce_scatter_kernel, "pull": _pull_reduce_scatter_kernel}


def _run(
    algorithm: str,
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts | Sequence[Parts],
    op: str,
    timeout: float | None,
    call: CallDescription | None,
    piece_nbytes: int,
) -> torch.Tensor:
    """Check, and launch each piece as one call of the group."""
    check_reduction(x.dtype, op)
    layout = staging_of(arena).layout
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("reduce_scatter", name, reduce=op, algorithm=f"triton:{algorithm}")
    rows, out_rows = rows_of(x, arena), rows_of(out, arena)
    tables = [
        exchange_pieces(algorithm, layout, one.scaled(x.itemsize), piece_nbytes) for one in each_rank(parts)
    ]
    for pieces in zip(*tables, strict=True):
        table, unit = part_table(pieces, x.itemsize, arena)
        longest = pieces[0].longest // x.itemsize
        tile = tile_of(x.itemsize, longest, arena.world_size)
        num_blocks = grid_of(triton.cdiv(longest, tile), arena.max_blocks)
        launch(
            _KERNELS[algorithm], num_blocks, arena, call, timeout,
            rows, out_rows, rows.stride(0), out_rows.stride(0), table,
            HALF_BYTES=layout.half_bytes, SLOT_BYTES=layout.slot_bytes, UNIT=unit, BLOCK=tile,
            OP=op, ACC=accumulator_of(x.dtype),
        )  # fmt: skip
    return out
