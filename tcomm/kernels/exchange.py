"""Gather, scatter, broadcast and all-to-all: every rank gives ranges of x to ranks, which put them in out.

=========  =====================  ======  =====================================================
algorithm  bytes in, per rank     rounds  wins
=========  =====================  ======  =====================================================
push       what it receives       1       small: data is local when the wait is over
pull       what it receives       1       large: what all ranks get is staged once
=========  =====================  ======  =====================================================

Which range goes where is a table (`tcomm.parts`), the same for all of these verbs: all-gather and broadcast
give one range to all, scatter and all-to-all one after another, and lengths may differ by rank and be 0.

Needs: tables of all ranks that fit together; x and out contiguous, and apart or every part in its place.

Source: the push and pull all-gather of PyTorch symmetric memory and Triton-distributed, with the trailing
barrier replaced by double buffering; a rank that gives nothing still publishes (DeepEP's argument).

Meaning: `all_gather`, `scatter`, `broadcast` and `all_to_all` of `tcomm.reference`.
Contract: `docs/memory-model.md`.
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
from tcomm.kernels.partition import as_words, each_rank, given_part, part_from, part_table, part_to
from tcomm.kernels.tiles import copy_span, spread_span
from tcomm.memory.base import KernelArena
from tcomm.memory.layout import exchange_pieces
from tcomm.parts import Parts
from tcomm.signature import CallDescription

__all__ = ["LAUNCHERS", "pull_exchange", "push_exchange"]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride"]


@triton.jit(do_not_specialize=_RUNTIME)
def _push_exchange_kernel(
    x_ptr, out_ptr, x_stride, out_stride,
    parts_ptr,  # [4, W] int64, see part_table
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, SHARED: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank writes each part of x into its slot of the rank that gets it, which copies it to out.

    Example (all-to-all): W=2, x_0=[1, 2], x_1=[10, 20] -> slots of rank 0 [1] [10], of rank 1 [2] [20]
    -> out_0=[1, 10], out_1=[2, 20].
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

    if SHARED:
        first, numel = given_part(parts_ptr, WORLD, UNIT)
        spread_span(x_ptr + first, staging_ptrs, half + rank * SLOT_BYTES, numel, rank, WORLD, BLOCK)
    else:
        for step in tl.static_range(WORLD):
            peer = (rank + step + 1) % WORLD
            first, numel = part_to(parts_ptr, peer, WORLD, UNIT)
            dst_ptr = pointer_to(staging_ptrs, peer, half + rank * SLOT_BYTES, dtype)
            copy_span(x_ptr + first, dst_ptr, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        for source in tl.static_range(WORLD):
            first, numel = part_from(parts_ptr, source, WORLD, UNIT)
            src_ptr = pointer_to(staging_ptrs, rank, half + source * SLOT_BYTES, dtype)
            copy_span(src_ptr, out_ptr + first, numel, BLOCK)
    finish_call(page, word)


def push_exchange(
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts | Sequence[Parts],
    *,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
    piece_nbytes: int = 0,
) -> torch.Tensor:
    """Move ranges of x to other ranks' out, each pushed by its source. **Collective.**

    Args:
        x: what this rank gives, contiguous; any dtype.
        out: what it gets, contiguous, of the dtype of x.
        arena: of the group, with staging. A part longer than a slot goes in several pieces.
        parts: which ranges go where, in elements; the tables of all ranks must fit together.
            Of virtual ranks, all tables.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.
        piece_nbytes: bytes of a part in a piece, at most; 0: as many as fit. The same on every rank.

    Returns:
        `out`.

    Raises:
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    return _run("push", x, out, arena, parts, timeout, call, piece_nbytes)


@triton.jit(do_not_specialize=_RUNTIME)
def _pull_exchange_kernel(
    x_ptr, out_ptr, x_stride, out_stride,
    parts_ptr,  # [4, W] int64, see part_table
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, SHARED: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank stages the parts of x at home, once where all get the same; their owners fetch them.

    Example (all-gather): W=2, x_0=[1, 2], x_1=[10] -> staged [1, 2] on 0, [10] on 1 -> out=[1, 2, 10].
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

    if SHARED:
        first, numel = given_part(parts_ptr, WORLD, UNIT)
        copy_span(x_ptr + first, pointer_to(staging_ptrs, rank, half, dtype), numel, BLOCK)
    else:
        for step in tl.static_range(WORLD):
            peer = (rank + step + 1) % WORLD
            first, numel = part_to(parts_ptr, peer, WORLD, UNIT)
            dst_ptr = pointer_to(staging_ptrs, rank, half + peer * SLOT_BYTES, dtype)
            copy_span(x_ptr + first, dst_ptr, numel, BLOCK)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    if await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        for step in tl.static_range(WORLD):
            source = (rank + step) % WORLD
            first, numel = part_from(parts_ptr, source, WORLD, UNIT)
            offset = half
            if not SHARED:
                offset += rank * SLOT_BYTES
            src_ptr = pointer_to(staging_ptrs, source, offset, dtype)
            copy_span(src_ptr, out_ptr + first, numel, BLOCK)
    finish_call(page, word)


def pull_exchange(
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts | Sequence[Parts],
    *,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
    piece_nbytes: int = 0,
) -> torch.Tensor:
    """Move ranges of x to other ranks' out, each fetched by its destination. **Collective.**

    Arguments, result and errors are those of `push_exchange`; a part that all get may fill a whole half.

    Raises:
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    return _run("pull", x, out, arena, parts, timeout, call, piece_nbytes)


LAUNCHERS: dict[str, Callable[..., torch.Tensor]] = {"push": push_exchange, "pull": pull_exchange}
"""Launcher of each algorithm, by its name without the engine."""

_KERNELS = {"push": _push_exchange_kernel, "pull": _pull_exchange_kernel}


def _run(
    algorithm: str,
    x: torch.Tensor,
    out: torch.Tensor,
    arena: KernelArena,
    parts: Parts | Sequence[Parts],
    timeout: float | None,
    call: CallDescription | None,
    piece_nbytes: int,
) -> torch.Tensor:
    """Launch each piece as one call of the group."""
    layout = staging_of(arena).layout
    words, out_words = as_words(rows_of(x, arena)), as_words(rows_of(out, arena))
    size = words.itemsize
    if call is None:
        name = str(x.dtype).removeprefix("torch.")
        call = CallDescription("exchange", name, algorithm=f"triton:{algorithm}")
    tables = [
        exchange_pieces(algorithm, layout, one.scaled(x.itemsize), piece_nbytes) for one in each_rank(parts)
    ]
    for pieces in zip(*tables, strict=True):
        table, unit = part_table(pieces, size, arena)
        longest = pieces[0].longest // size
        tile = tile_of(size, longest)
        launch(
            _KERNELS[algorithm], grid_of(triton.cdiv(longest, tile), arena.max_blocks), arena, call, timeout,
            words, out_words, words.stride(0), out_words.stride(0), table,
            HALF_BYTES=layout.half_bytes, SLOT_BYTES=layout.slot_bytes, UNIT=unit,
            SHARED=all(_is_shared(algorithm, piece) for piece in pieces),
            BLOCK=tile,
        )  # fmt: skip
    return out


def _is_shared(algorithm: str, piece: Parts) -> bool:
    """Whether a kernel treats what it gives as one range.

    Where a pulled range lies depends on it, so all ranks have to say the same. Pushed parts lie in the slot
    of their source either way: there it pays only when every rank gets the range, and not one root.
    """
    gets = {nbytes > 0 for _, nbytes in piece.sends}
    return piece.shared and (algorithm == "pull" or len(gets) == 1)
