"""Barrier: no program of any rank returns before every rank has launched.

Source: the arrival words of every other kernel here, and nothing else.

Contract: `docs/memory-model.md`.
"""

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
)
from tcomm.kernels.launch import launch
from tcomm.memory.base import KernelArena
from tcomm.signature import CallDescription

__all__ = ["arrival_barrier"]

_BARRIER = CallDescription("barrier", algorithm="triton:arrival")


@triton.jit(do_not_specialize=["rank", "signature", "budget"])
def _arrival_barrier_kernel(
    staging_ptrs, pad_ptrs,  # [W] int64, symmetric
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr,
):  # fmt: skip
    """Every rank writes its word into every page, and waits for all words in its own.

    Example: W=2, epoch 7 -> both pages hold (7, signature) from 0 and from 1 before either rank goes on.
    """
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    lane_ptr = pointer_to(staging_ptrs, rank, 0, tl.int64)
    word = begin_call(page, lane_ptr, signature, LANE_HALF_BYTES // 8)
    publish(pad_ptrs, rank, 0, word, WORLD, LANES)
    await_peers(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL)
    finish_call(page, word)


def arrival_barrier(
    arena: KernelArena, *, timeout: float | None = 120.0, call: CallDescription = _BARRIER
) -> None:
    """Wait until every rank has come here. **Collective.**

    Args:
        arena: of the group, with staging.
        timeout: seconds; None: while the peers live.
        call: what the ranks compare.

    Raises:
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    launch(_arrival_barrier_kernel, 1, arena, call, timeout)
