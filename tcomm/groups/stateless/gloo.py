"""Process groups of torch that torch.distributed does not know of."""

from __future__ import annotations

import datetime
import functools
import os
import socket
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import (
    _register_process_group,
    _unregister_process_group,
)

from tcomm.config import resolve_timeout
from tcomm.errors import CapabilityError, PeerLostError, PeerTimeoutError
from tcomm.groups.arguments import Timeout
from tcomm.groups.stateless.addresses import local_address_towards
from tcomm.groups.stateless.creation import OpenedGroup, open_group

__all__ = [
    "init_gloo_process_group",
    "stateless_destroy_torch_distributed_process_group",
    "stateless_init_torch_distributed_process_group",
]

_DEFAULT_SECONDS = 300.0
_NO_LIMIT_SECONDS = 365.0 * 86400
_opened: weakref.WeakKeyDictionary[dist.ProcessGroup, OpenedGroup] = weakref.WeakKeyDictionary()
"""What groups stand on, so that later groups at their address find the store in this process."""


def stateless_init_torch_distributed_process_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str,
    *,
    group_name: str | None = None,
    return_store: bool = False,
    listen_socket: socket.socket | None = None,
    timeout: Timeout | datetime.timedelta = None,
) -> dist.ProcessGroup | tuple[dist.ProcessGroup, Store]:
    """A process group of torch, made without torch.distributed, which stays as it is. **Collective.**

    Calls that know group ranks alone, such as `dist.all_reduce(x, group=pg)` and the methods of the group,
    work on it; those that translate global ranks, such as `dist.broadcast`, do not. Any number of groups can
    meet at one address; those of one name, in the same order on every rank.

    Args:
        host: where rank 0 listens; anything but loopback needs TCOMM_SECRET, which does not sign what gloo
            sends: see `docs/rendezvous.md`. Gloo listens on this host's address towards it.
        port: likewise.
        rank: this process.
        world_size: number of ranks.
        backend: `gloo`.
        group_name: registers the group with torch by this name, for functional collectives.
        return_store: whether to return the group's store, too.
        listen_socket: rank 0's, bound and listening; owned by the group from now on.
        timeout: of the meeting and of the group: seconds, a profile, a timedelta or None, which is 300 s.

    Raises:
        CapabilityError: when the backend is another than gloo.
        ConfigError, OSError, RendezvousError: as `StatelessProcessGroup.create` does.
    """
    if backend != "gloo":
        raise CapabilityError(
            f"backend {backend!r}: a stateless process group is made of 'gloo' alone; for GPUs make a "
            "tcomm.Communicator.from_store over its store (return_store=True)"
        )
    seconds = _seconds(timeout)
    opened = open_group(host, port, rank, world_size, group_name or "torch", seconds, listen_socket)
    store = PrefixStore("gloo", opened.sealed.store)
    limit = datetime.timedelta(seconds=seconds)
    pg = _make(store, rank, world_size, limit, local_address_towards(host, port))
    _opened[pg] = opened
    if group_name is not None:
        pg._set_group_name(group_name)
        _register_process_group(group_name, pg)
    return (pg, store) if return_store else pg


def stateless_destroy_torch_distributed_process_group(pg: dist.ProcessGroup) -> None:
    """Shut a group down that `stateless_init_torch_distributed_process_group` made. May be called twice.

    The store at its address ends with the last group there.
    """
    opened = _opened.pop(pg, None)
    if opened is None:
        return
    pg.shutdown()
    if pg.group_name:
        _unregister_process_group(pg.group_name)


def init_gloo_process_group(
    prefix_store: Store, group_rank: int, group_size: int, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """A process group of gloo alone over a store. **Collective.**

    Gloo listens on loopback when the store does, else where GLOO_SOCKET_IFNAME or the host's name says.

    Args:
        prefix_store: a store below a prefix that no other group has.
        group_rank: this process.
        group_size: number of ranks.
        timeout: of its collectives, and to connect.

    Raises:
        PeerTimeoutError: when a rank did not come in time. PeerLostError: when the store is gone.
    """
    return _make(prefix_store, group_rank, group_size, timeout, None)


def _make(
    store: Store, rank: int, world_size: int, timeout: datetime.timedelta, address: str | None
) -> dist.ProcessGroup:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [_device(os.getpid(), address)]
    pg: Any = dist.ProcessGroup(store, rank, world_size)
    try:
        backend = gloo(store, rank, world_size, options)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        kind = PeerTimeoutError if "imeout" in reason or "imed out" in reason else PeerLostError
        raise kind(
            f"gloo did not connect rank {rank} to the others of {world_size} within "
            f"{timeout.total_seconds():g} s: {reason}",
            op="init_gloo_process_group",
            rank=rank,
        ) from error
    backend._set_sequence_number_for_group()
    pg._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    pg._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return pg


@functools.cache
def _device(pid: int, address: str | None) -> Any:
    """Gloo's socket and thread on an address of this host, shared by the groups of this process."""
    del pid  # a child of a fork has none of its parent's threads
    gloo: Any = dist.ProcessGroupGloo
    return gloo.create_default_device() if address is None else gloo.create_device(hostname=address)


def _seconds(timeout: Timeout | datetime.timedelta) -> float:
    if isinstance(timeout, datetime.timedelta):
        timeout = timeout.total_seconds()
    return resolve_timeout(_DEFAULT_SECONDS if timeout is None else timeout) or _NO_LIMIT_SECONDS
