"""The one-sided exchange of tokens on a CPU: rows are pushed to where they are used, and results pulled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.cpu.moe_counts import swap_counts
from tcomm.memory.arena import Arena
from tcomm.signature import CallDescription

__all__ = ["combine", "dispatch"]


def dispatch(
    payloads: Sequence[torch.Tensor],
    offsets: Sequence[int],
    routes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    runtime_max: int,
    arena: Arena,
    call: CallDescription,
    timeout: float | None,
) -> torch.Tensor:
    """Push a copy of each token's rows to every rank that gets it. **Collective.**

    Args:
        payloads: [T, words] each, integers.
        offsets: where the [W, runtime_max, words] rows of each lie in the first half of every rank's staging.
        routes: [T, k] int64 rank of each copy, or -1; [T, k] int64 its place among the rows of this rank
            there; [W] int64 copies for each rank.
        runtime_max: rows of a source.
        arena: of the group.
        call: what the ranks compare.
        timeout: seconds.

    Returns:
        [W] int64: copies from each rank.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    # Rows go in token order, so their places follow from the ranks.
    ranks, _, counts = routes
    epoch = arena.channel.begin(call, timeout)
    for peer in range(arena.world_size):
        tokens = (ranks == peer).any(1).nonzero().flatten()
        if not len(tokens):
            continue
        for payload, offset in zip(payloads, offsets, strict=True):
            block = _block(arena, peer, offset, arena.rank, runtime_max, payload.shape[1], payload.dtype)
            torch.index_select(payload, 0, tokens, out=block[: len(tokens)])
    received = swap_counts(arena, epoch, call, counts)
    arena.channel.finish(epoch)
    return received


def combine(
    payload: torch.Tensor | None,
    out: torch.Tensor,
    offset: int,
    routes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    received: torch.Tensor,
    runtime_max: int,
    arena: Arena,
    call: CallDescription,
    timeout: float | None,
) -> None:
    """Add up what the ranks made of each token, in fp32 and the order of its experts. **Collective.**

    Args:
        payload: [W, runtime_max, H], what this rank made of what it got; None: it lies in staging.
        out: [T, H], is written.
        offset: where such rows lie in the first half of every rank's staging.
        routes: as for `dispatch`.
        received: what `dispatch` gave.
        runtime_max: as for `dispatch`.
        arena: as for `dispatch`.
        call: as for `dispatch`.
        timeout: seconds.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    channel, rank, hidden = arena.channel, arena.rank, out.shape[1]
    epoch = channel.begin(call, timeout)
    if payload is not None:
        for source, count in enumerate(received.tolist()):
            block = _block(arena, rank, offset, source, runtime_max, hidden, out.dtype)
            block[:count].copy_(payload[source, :count])
    word = epoch << 32 | call.signature
    channel.publish(0, word)
    channel.await_peers(0, word)
    blocks = [
        _block(arena, peer, offset, rank, runtime_max, hidden, out.dtype) for peer in range(arena.world_size)
    ]
    out.copy_(_sum(blocks, routes[0], routes[1], hidden))
    channel.finish(epoch)


def _sum(
    blocks: Sequence[torch.Tensor], ranks: torch.Tensor, slots: torch.Tensor, hidden: int
) -> torch.Tensor:
    total = torch.zeros(len(ranks), hidden, dtype=torch.float32, device="cpu")
    for entry in range(ranks.shape[1]):
        for peer, block in enumerate(blocks):
            tokens = (ranks[:, entry] == peer).nonzero().flatten()
            if len(tokens):
                rows = block.index_select(0, slots[:, entry].index_select(0, tokens))
                total.index_add_(0, tokens, rows.to(torch.float32))
    return total


def _block(
    arena: Arena, holder: int, offset: int, source: int, runtime_max: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """[runtime_max, width]: the rows that a rank holds of one source."""
    staging = arena.staging
    assert staging is not None
    begin = staging.layout.half(0) + offset + source * runtime_max * width * dtype.itemsize
    return staging.buffer.peer(holder, (runtime_max, width), dtype, begin)
