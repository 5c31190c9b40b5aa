"""Counts of tokens between ranks: one word for each pair, which says of which call it is.

An exchange of tokens is several launches. `open_call` announces and publishes, as the last of those that
give; a launch that takes waits for that one word of every rank.
"""

import torch
import triton
import triton.language as tl

from tcomm.kernels.device import begin_call, finish_call, launched_rank, page_of, pointer_to, record_late
from tcomm.kernels.launch import launch_part
from tcomm.kernels.moe_row_tables import table_of
from tcomm.kernels.phases import await_ranks, open_word, publish_last
from tcomm.memory import control
from tcomm.memory.base import KernelArena
from tcomm.signature import CallDescription

__all__ = ["open_call", "take_counts"]

_RUNTIME = ["rank", "signature", "budget"]
_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)


@triton.jit(do_not_specialize=_RUNTIME)
def _open_call_kernel(
    counts_ptr,  # [W] int64
    staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Write this rank's count for each rank into that rank's words of the parity, and publish.

    Example: W=2, epoch 6, counts of rank 1 [5, 0] -> words 0 to 1 of the staging of rank 0 [_, 6 << 32 | 5],
    of rank 1 [_, 6 << 32].
    """
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    if COUNTED:
        lanes = tl.arange(0, LANES)
        mask = lanes < WORLD
        counts = tl.load(table_of(counts_ptr, WORLD, rank, VIRTUAL) + lanes, mask=mask, other=0)
        parity = (word >> 32) & 1
        base = tl.load(staging_ptrs + lanes, mask=mask, other=0) + 2 * LANE_HALF_BYTES
        theirs = (base + (parity * WORLD + rank) * 8).to(tl.pointer_type(tl.int64))
        tl.store(theirs, (word & ~_EPOCH_MASK) | counts, mask=mask)
    publish_last(page, pad_ptrs, rank, 0, word, WORLD, LANES)


def open_call(
    counts: torch.Tensor,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None = None,
    counted: bool = True,
) -> int | None:
    """Publish a call, and with it how many rows each rank gets.

    Args:
        counts: [W] int64, for each rank; of virtual ranks [W, W].
        arena: of the group, with staging.
        call: what the ranks compare.
        timeout: seconds.
        epoch: of the call; None where this is its first launch.
        counted: whether there are counts; else only the call is published.

    Returns:
        The epoch; None where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run it on.
    """
    given = counts.contiguous()
    begun = launch_part(_open_call_kernel, 1, arena, call, timeout, epoch, given, COUNTED=counted)
    return begun if epoch is None else epoch


@triton.jit(do_not_specialize=_RUNTIME)
def _take_counts_kernel(
    received_ptr,  # [W] int64
    staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr,
):  # fmt: skip
    """Wait for all ranks, and read what they announced; the call is over. A word of another call is an error.

    Example: W=2, epoch 6, own words [6 << 32 | 2, 6 << 32 | 5] -> received [2, 5].
    """
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        lanes = tl.arange(0, LANES)
        mask = lanes < WORLD
        parity = (word >> 32) & 1
        words_ptr = pointer_to(staging_ptrs, rank, 2 * LANE_HALF_BYTES, tl.int64) + parity * WORLD
        words = tl.load(words_ptr + lanes, mask=mask, other=0)
        stale = mask & (((words ^ word) & ~_EPOCH_MASK) != 0)
        received = tl.where(stale, 0, words & _EPOCH_MASK)
        tl.store(table_of(received_ptr, WORLD, rank, VIRTUAL) + lanes, received, mask=mask)
        culprit = tl.min(tl.where(stale, lanes, LANES), axis=0)
        if culprit < LANES:
            record_late(page, culprit, word)
    finish_call(page, word)


def take_counts(
    received: torch.Tensor,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None,
) -> None:
    """Wait for the counts of all ranks, and end the call. **Collective.**

    Args:
        received: [W] int64, is written: rows from each rank; of virtual ranks [W, W].
        arena: of the group.
        call: what was published.
        timeout: seconds.
        epoch: of the call.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    launch_part(_take_counts_kernel, 1, arena, call, timeout, epoch, received)
    if epoch is not None:
        arena.channel.after_kernel(epoch)
