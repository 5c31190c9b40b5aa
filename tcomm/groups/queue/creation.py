"""Queues for all ranks of a group at once."""

from __future__ import annotations

from typing import cast

import msgspec
import torch.distributed as dist

from tcomm.config import Config, resolve_timeout
from tcomm.errors import RendezvousError, TcommError
from tcomm.groups.arguments import check_rank
from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import gather_bytes, in_the_same_node_as, place_of
from tcomm.objects.codec import decode, encode, register

__all__ = ["queue_of_group", "queues_to_one_reader"]

_Group = dist.ProcessGroup | StatelessProcessGroup
_LONGEST_SECONDS = 1800.0


@register
class _Offer(msgspec.Struct, frozen=True):
    """What a rank tells the others: its handle, or why it has none."""

    handle: Handle | None = None
    problem: str = ""


def _seconds(timeout: float | None) -> float:
    seconds = resolve_timeout(Config.from_environment().timeout if timeout is None else timeout)
    return _LONGEST_SECONDS if seconds is None else seconds


def _exchange(pg: _Group, offer: _Offer, timeout: float) -> list[_Offer]:
    """Every rank's offer. Raises RendezvousError on every rank when one of them has a problem."""
    offers = [cast("_Offer", decode(row)) for row in gather_bytes(pg, encode(offer).join(), timeout)]
    problems = [f"rank {rank}: {offer.problem}" for rank, offer in enumerate(offers) if offer.problem]
    if problems:
        raise RendezvousError(f"no queue for the group ({'; '.join(problems)[:2000]})")
    return offers


def _made(pg: _Group, make: MessageQueue | TcommError | None, timeout: float) -> list[_Offer]:
    """Tell the others what came of making a queue, and hear what came of theirs."""
    if isinstance(make, TcommError):
        offer = _Offer(problem=f"{type(make).__name__}: {make}"[:2000])
    else:
        offer = _Offer(make.export_handle() if make is not None else None)
    try:
        return _exchange(pg, offer, timeout)
    except TcommError:
        if isinstance(make, MessageQueue):
            make.shutdown()
        raise


def queue_of_group(
    pg: _Group,
    max_chunk_bytes: int,
    max_chunks: int,
    writer_rank: int,
    external_writer_handle: Handle | None,
    drop_dead_readers: bool,
    timeout: float | None,
) -> MessageQueue:
    """As `MessageQueue.create_from_process_group`, not awaited. **Collective.**

    Raises:
        ConfigError, RendezvousError, PeerTimeoutError, PeerLostError: as there.
    """
    rank, world_size = place_of(pg)
    check_rank("create_from_process_group", "writer_rank", writer_rank, world_size)
    seconds = _seconds(timeout)
    near = in_the_same_node_as(pg, writer_rank, timeout=seconds)
    made: MessageQueue | TcommError | None = None
    if rank == writer_rank and external_writer_handle is None:
        readers = [peer for peer, is_near in enumerate(near) if is_near and peer != writer_rank]
        try:
            made = MessageQueue(
                world_size - 1, len(readers), readers, max_chunk_bytes, max_chunks,
                drop_dead_readers=drop_dead_readers, writer_rank=writer_rank,
            )  # fmt: skip
        except TcommError as error:
            made = error
    if external_writer_handle is not None and rank == writer_rank:
        handle: Handle | None = _exchange(pg, _Offer(external_writer_handle), seconds)[writer_rank].handle
    else:
        handle = _made(pg, made, seconds)[writer_rank].handle
    if isinstance(made, MessageQueue):
        return made
    assert handle is not None
    return MessageQueue.create_from_handle(handle, rank)


def queues_to_one_reader(
    pg: _Group, max_chunk_bytes: int, max_chunks: int, reader_rank: int, timeout: float | None
) -> tuple[MessageQueue, list[Handle]]:
    """As `MessageQueue.create_from_process_group_single_reader`, not awaited. **Collective.**

    Raises:
        ConfigError, RendezvousError, PeerTimeoutError, PeerLostError: as there.
    """
    rank, world_size = place_of(pg)
    check_rank("create_from_process_group_single_reader", "reader_rank", reader_rank, world_size)
    seconds = _seconds(timeout)
    near = in_the_same_node_as(pg, reader_rank, timeout=seconds)
    made: MessageQueue | TcommError
    try:
        made = MessageQueue(1, int(near[rank]), None, max_chunk_bytes, max_chunks, writer_rank=rank)
    except TcommError as error:
        made = error
    offers = _made(pg, made, seconds)
    assert isinstance(made, MessageQueue)
    if rank != reader_rank:
        return made, []
    return made, [offer.handle for offer in offers if offer.handle is not None]
