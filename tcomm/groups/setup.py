"""How the ranks of a group find one another and agree on all that a later choice depends on."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import secrets
import threading
import weakref
from typing import cast

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.config import Config
from tcomm.errors import ConfigError, DuplicateRankError
from tcomm.groups.differences import installed_version, refuse_differences
from tcomm.interpret import why_not_runnable
from tcomm.memory.base import Exchange
from tcomm.memory.control import LAYOUT_VERSION
from tcomm.memory.exchange import LocalExchange, Store, StoreExchange
from tcomm.tuning.table import Table, decode_table, load_table

__all__ = [
    "Membership",
    "Settlement",
    "agree_on_settings",
    "exchange_of",
    "from_process_group",
    "from_store",
    "split_exchange",
    "split_membership",
]

logger = logging.getLogger("tcomm")

_counter_lock = threading.Lock()
_made: collections.Counter[str] = collections.Counter()
_made_of: weakref.WeakKeyDictionary[dist.ProcessGroup, collections.Counter[str]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Membership:
    """Who is in a group, and how they reach one another before they share memory."""

    name: str
    """For errors and logs."""
    exchange: Exchange
    """Reaches the other ranks."""
    process_group: dist.ProcessGroup | None
    """What to fall back to."""
    global_ranks: tuple[int, ...]
    """Rank of each member in the world it was made from."""


def _prefix(name: str, of: dist.ProcessGroup | None = None) -> str:
    """Keys of one group. Ranks make their groups of one name in the same order.

    Counts for each process group anew: processes that meet in one may have had others before.
    """
    with _counter_lock:
        made = _made if of is None else _made_of.setdefault(of, collections.Counter())
        made[name] += 1
        return f"tcomm/{name}/{made[name]}"


def from_process_group(group: dist.ProcessGroup | DeviceMesh | None, name: str) -> Membership:
    """Membership of a process group, a one-dimensional mesh, the default group or, without one, alone.

    A group that torch.distributed does not know has nothing to fall back to.

    Raises:
        ConfigError: when the mesh has several dimensions, or this process is not a member.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(
                f"a mesh of {group.ndim} dimensions {group.mesh_dim_names} is not one group; "
                'take one of them, as in mesh["tp"]'
            )
        group = group.get_group()
    if group is None:
        if not dist.is_initialized():
            return Membership(name or "alone", LocalExchange(), None, (0,))
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"{group!r} is no process group that this rank belongs to, and no DeviceMesh")
    name = name or group.group_desc or group.group_name or "stateless"
    exchange = exchange_of(group, name)
    try:
        global_ranks = tuple(dist.get_process_group_ranks(group))
    except KeyError:
        # torch.distributed's verbs do not take a group that it does not know.
        return Membership(name, exchange, None, tuple(range(group.size())))
    return Membership(name, exchange, group, global_ranks)


def exchange_of(group: dist.ProcessGroup, name: str) -> StoreExchange:
    """An exchange of a process group's ranks, by keys that nobody else has. The same names in one order."""
    store = cast("Store", group.get_group_store())
    return StoreExchange(store, group.rank(), group.size(), _prefix(f"{group.group_name}/{name}", group))


def from_store(store: Store, rank: int, world_size: int, name: str) -> Membership:
    """Membership given by a store alone; nothing to fall back to.

    Raises:
        ConfigError: when rank and world_size make no sense.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} ranks: it must be at least 0 and below their number")
    exchange = StoreExchange(store, rank, world_size, _prefix(name))
    return Membership(name, exchange, None, tuple(range(world_size)))


def split_exchange(members: Membership, name: str) -> Exchange:
    """Another exchange of the same ranks, whose messages meet nobody else's. **Collective.**"""
    return members.exchange.split(name)


def split_membership(members: Membership, name: str) -> Membership:
    """The same ranks, as another group that reaches them by keys of its own."""
    exchange = members.exchange.split(name)
    return dataclasses.replace(members, name=f"{members.name}/{name}", exchange=exchange)


class _Settings(msgspec.Struct, frozen=True):
    """What a rank tells the others when a group is made."""

    claim: str
    same: dict[str, str]
    no_kernels: str
    cores: list[int]
    table: bytes = b""


@dataclasses.dataclass(frozen=True)
class Settlement:
    """What the ranks agreed on, the same on each of them."""

    table: Table
    """Rank 0's tuning table."""
    no_kernels: str
    """Why kernels cannot run on host memory; empty when they can on every rank."""
    num_cores: int
    """Different cores that the ranks may run on."""


def agree_on_settings(members: Membership, config: Config, timeout: float) -> Settlement:
    """Compare all that choices depend on, and take rank 0's tuning table. **Collective.**

    Raises:
        GroupMismatchError: on every rank, when settings differ; shows which, and each rank's value.
        DuplicateRankError: when two processes claim one rank.
        RendezvousError: when a rank did not come in time.
    """
    table = load_table(config.table)
    rank = members.exchange.rank
    same = {
        "tcomm": installed_version(),
        "control page layout": str(LAYOUT_VERSION),
        "torch": str(torch.__version__),
        "members": str(members.global_ranks),
        "TCOMM_ALGORITHM": config.algorithm,
        "TCOMM_DETERMINISTIC": str(int(config.deterministic)),
        "TCOMM_STAGING_BYTES": str(config.staging_bytes),
        "TCOMM_ALLOW_SHARED_DEVICE": str(int(config.allow_shared_device)),
    }
    claim = secrets.token_hex(8)
    mine = _Settings(
        claim,
        same,
        why_not_runnable(),
        sorted(os.sched_getaffinity(0)),
        table.encode() if rank == 0 else table.digest.encode(),
    )
    payloads = members.exchange.all_gather(msgspec.msgpack.encode(mine), timeout)
    everyone = [msgspec.msgpack.decode(payload, type=_Settings) for payload in payloads]
    if everyone[rank].claim != claim:
        raise DuplicateRankError(
            f"another process also claims rank {rank} of group {members.name!r}; give each its own rank"
        )
    refuse_differences(members.name, [settings.same for settings in everyone])
    agreed = decode_table(everyone[0].table, "the tuning table of rank 0")
    if agreed.digest != table.digest:
        logger.warning("group %r: using the tuning table of rank 0, which differs from mine", members.name)
    reasons = [f"rank {r}: {s.no_kernels}" for r, s in enumerate(everyone) if s.no_kernels]
    cores = {core for settings in everyone for core in settings.cores}
    return Settlement(agreed, "; ".join(reasons), len(cores))
