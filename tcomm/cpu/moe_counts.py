"""Counts of tokens between ranks on a CPU: one word each, which says of which call it is."""

from __future__ import annotations

import torch

from tcomm.errors import DecodeError
from tcomm.memory.arena import Arena
from tcomm.signature import CallDescription

__all__ = ["swap_counts"]


def swap_counts(arena: Arena, epoch: int, call: CallDescription, counts: torch.Tensor) -> torch.Tensor:
    """Publish an epoch with a count for each rank, and wait for those of all. **Collective.**

    The words lie at the beginning of the first half of staging: [2, W], one row for each parity.

    Args:
        arena: of the group.
        epoch: which `arena.channel` has begun.
        call: what the ranks compare.
        counts: [W] int64, for each rank; below 2**32.

    Returns:
        [W] int64, from each rank.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        DecodeError: when a word is of another call, which cannot be.
    """
    channel, staging = arena.channel, arena.staging
    assert staging is not None
    world = arena.world_size
    begin = staging.layout.half(0) + (epoch & 1) * world * 8
    for peer, count in enumerate(counts.tolist()):
        staging.buffer.peer(peer).numpy().data[begin + arena.rank * 8 :][:8].cast("Q")[0] = (
            epoch << 32 | count
        )
    word = epoch << 32 | call.signature
    channel.publish(0, word)
    channel.await_peers(0, word)
    words = staging.buffer.local.numpy().data[begin : begin + world * 8].cast("Q").tolist()
    if any(word >> 32 != epoch for word in words):
        stale = [peer for peer, word in enumerate(words) if word >> 32 != epoch]
        raise DecodeError(
            f"counts of call #{epoch} are of calls {[word >> 32 for word in words]}", seq=epoch, peers=stale
        )
    return torch.tensor([word & 0xFFFFFFFF for word in words], dtype=torch.int64, device="cpu")
