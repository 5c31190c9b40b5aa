"""Gather, scatter, broadcast and all-to-all on a CPU: the algorithms of `tcomm.kernels.exchange`.

Prepared once per kind of call; the contract is that of the kernels, and data of any dtype only moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tcomm.cpu.copies import Copies, Place, make_move
from tcomm.memory.arena import Arena
from tcomm.memory.base import Staging
from tcomm.memory.layout import exchange_pieces, part_offset
from tcomm.parts import Parts
from tcomm.signature import CallDescription

__all__ = ["ExchangePlan", "fetched_places", "in_turn", "make_exchange_plan", "staged_places"]

ExchangePlan = Callable[[torch.Tensor, torch.Tensor, "float | None"], None]
"""Takes contiguous x and out and the timeout in seconds. **Collective.** Raises what a `Channel` raises."""


def make_exchange_plan(
    algorithm: str,
    arena: Arena,
    call: CallDescription,
    parts: Parts,
    itemsize: int,
    piece_nbytes: int = 0,
) -> ExchangePlan:
    """Prepare `algorithm` for tensors of which `parts` says what goes where.

    Args:
        algorithm: `push` or `pull`.
        arena: of the group, with staging.
        call: what the ranks compare.
        parts: of this rank, in elements.
        itemsize: bytes an element.
        piece_nbytes: bytes of a part to handle at once, at most; 0: as many as fit. The same on every rank.
    """
    staging = arena.staging
    if staging is None:
        raise AssertionError("the arena has no staging")
    pieces = exchange_pieces(algorithm, staging.layout, parts.scaled(itemsize), piece_nbytes)
    runs = [_prepare(algorithm, arena, staging, call, piece) for piece in pieces]
    return in_turn(runs)


def in_turn(runs: Sequence[ExchangePlan]) -> ExchangePlan:
    """One plan after another, on the same tensors."""
    if len(runs) == 1:
        return runs[0]

    def run_all(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        for run in runs:
            run(x, out, timeout)

    return run_all


def staged_places(algorithm: str, staging: Staging, parts: Parts) -> list[Place]:
    """Where this rank puts what it gives to others, in bytes."""
    rank, layout = parts.rank, staging.layout
    if algorithm == "pull" and parts.shared:
        given = any(nbytes for peer, (_, nbytes) in enumerate(parts.sends) if peer != rank)
        first, nbytes = parts.given
        return [Place(rank, 0, first, nbytes)] if given else []
    places = []
    for step in range(1, parts.world_size):
        peer = (rank + step) % parts.world_size
        holder = rank if algorithm == "pull" else peer
        offset = part_offset(algorithm, layout, parts.shared, rank, peer)
        places.append(Place(holder, offset, *parts.sends[peer]))
    return places


def fetched_places(algorithm: str, staging: Staging, parts: Parts) -> list[Place]:
    """Where this rank finds what others give to it, in bytes; the next rank's first."""
    rank, layout = parts.rank, staging.layout
    places = []
    for step in range(1, parts.world_size):
        peer = (rank + step) % parts.world_size
        holder = peer if algorithm == "pull" else rank
        offset = part_offset(algorithm, layout, parts.shared, peer, rank)
        places.append(Place(holder, offset, *parts.receives[peer]))
    return places


def _prepare(
    algorithm: str, arena: Arena, staging: Staging, call: CallDescription, parts: Parts
) -> ExchangePlan:
    channel, signature = arena.channel, call.signature
    begin, publish, await_peers, finish = (
        channel.begin,
        channel.publish,
        channel.await_peers,
        channel.finish,
    )
    outgoing = [Copies(staging, p, staged_places(algorithm, staging, parts)).stage for p in (0, 1)]
    incoming = [Copies(staging, p, fetched_places(algorithm, staging, parts)).fetch for p in (0, 1)]
    keep = _make_keep(parts)

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        epoch = begin(call, timeout)
        outgoing[epoch & 1](x)
        word = epoch << 32 | signature
        publish(0, word)
        await_peers(0, word)
        keep(x, out)
        incoming[epoch & 1](out)
        finish(epoch)

    return run


def _keep_nothing(x: torch.Tensor, out: torch.Tensor) -> None:
    """For a rank that gives itself nothing."""


def _make_keep(parts: Parts) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Copies what this rank gives to itself; nothing to do where it is in its place."""
    source, nbytes = parts.sends[parts.rank]
    target, _ = parts.receives[parts.rank]
    if not nbytes:
        return _keep_nothing

    move = make_move(nbytes, parts.world_size)

    def keep(x: torch.Tensor, out: torch.Tensor) -> None:
        start, end = x.data_ptr() + source, out.data_ptr() + target
        if start != end:
            move(end, start, nbytes)

    return keep
