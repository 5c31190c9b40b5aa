"""Which ranks are on one node: those that can open a file in one another's shared memory."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from typing import cast

import msgspec
import torch.distributed as dist

from tcomm.config import Config
from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_rank
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.rows import gather_rows, has_cpu_backend
from tcomm.memory.shm import Offer, Segment

__all__ = ["count_nodes", "gather_bytes", "in_the_same_node_as", "place_of"]

logger = logging.getLogger("tcomm")

_SEGMENT_BYTES = 128
_MAGIC_BYTES = 32
_ROW_BYTES = 4096
_TIMEOUT_SECONDS = 120.0


def in_the_same_node_as(
    pg: dist.ProcessGroup | StatelessProcessGroup, source_rank: int = 0, *, timeout: float = _TIMEOUT_SECONDS
) -> list[bool]:
    """Which ranks share memory with `source_rank`, the same answer on every rank. **Collective.**

    The source writes random bytes into a file of 128 bytes in TCOMM_SHM_DIR and everyone tries to open it
    and to find them. A source that cannot make the file says so, and is then alone; nobody waits for it.

    Args:
        pg: a group with a backend for the CPU, or a stateless group.
        source_rank: a group rank.
        timeout: seconds for each of the two exchanges.

    Returns:
        For each group rank whether it is on the node of the source. The source is.

    Raises:
        ConfigError: when the group has no backend for the CPU, or no such rank. Nothing was sent.
        PeerTimeoutError, PeerLostError: when a rank did not come.
    """
    if isinstance(pg, dist.ProcessGroup) and not has_cpu_backend(pg):
        raise ConfigError("in_the_same_node_as should be tested with a non-NCCL group.")
    rank, world_size = place_of(pg)
    check_rank("in_the_same_node_as", "source_rank", source_rank, world_size)
    if world_size == 1:
        return [True]
    segment, offer, magic = None, b"", secrets.token_bytes(_MAGIC_BYTES)
    if rank == source_rank:
        segment, offer = _make(magic)
    try:
        offered = gather_bytes(pg, offer, timeout)[source_rank]
        found = b"" if rank == source_rank else _look(offered[_MAGIC_BYTES:], offered[:_MAGIC_BYTES])
        verdicts = gather_bytes(pg, found, timeout)
    finally:
        if segment is not None:
            segment.unlink()
            segment.close()
    return [peer == source_rank or bool(verdict) for peer, verdict in enumerate(verdicts)]


def count_nodes(pg: dist.ProcessGroup | StatelessProcessGroup, *, timeout: float = _TIMEOUT_SECONDS) -> int:
    """How many nodes the ranks of a group are on. **Collective.**

    Args:
        pg: as of `in_the_same_node_as`.
        timeout: seconds for each exchange.

    Raises:
        ConfigError, PeerTimeoutError, PeerLostError: as `in_the_same_node_as` does.
    """
    unassigned, nodes = set(range(place_of(pg)[1])), 0
    while unassigned:
        together = in_the_same_node_as(pg, min(unassigned), timeout=timeout)
        unassigned -= {rank for rank, here in enumerate(together) if here}
        nodes += 1
    return nodes


def place_of(pg: dist.ProcessGroup | StatelessProcessGroup) -> tuple[int, int]:
    """This rank in a group of either kind, and how many there are."""
    if isinstance(pg, StatelessProcessGroup):
        return pg.rank, pg.world_size
    return pg.rank(), pg.size()


def gather_bytes(
    pg: dist.ProcessGroup | StatelessProcessGroup, payload: bytes, timeout: float
) -> list[bytes]:
    """Every rank's payload, 4096 bytes at most, by group rank. **Collective.**

    Args:
        pg: as of `in_the_same_node_as`.
        payload: this rank's.
        timeout: seconds.

    Raises:
        PeerTimeoutError, PeerLostError: when a rank did not come.
    """
    if isinstance(pg, StatelessProcessGroup):
        return [cast("bytes", row) for row in pg.all_gather_obj(payload, timeout=timeout)]
    return gather_rows(pg, payload, _ROW_BYTES, timeout)


def _make(magic: bytes) -> tuple[Segment | None, bytes]:
    """The file and what to tell the others of it; nothing where it cannot be made."""
    directory = Config.from_environment().shm_dir
    try:
        segment = Segment.create(directory, _SEGMENT_BYTES)
    except OSError as error:
        logger.warning(
            "this rank shares memory with nobody: no file of %d bytes in %s: %s",
            _SEGMENT_BYTES, directory, error.strerror,
        )  # fmt: skip
        return None, b""
    os.pwrite(segment.fd, magic, 0)
    return segment, magic + msgspec.msgpack.encode(segment.offer())


def _look(offer: bytes, magic: bytes) -> bytes:
    """Something where this process finds `magic` in the file that was offered; else nothing."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        segment = Segment.open(msgspec.msgpack.decode(offer, type=Offer))
        try:
            return b"same" if os.pread(segment.fd, _MAGIC_BYTES, 0) == magic else b""
        finally:
            segment.close()
    return b""
