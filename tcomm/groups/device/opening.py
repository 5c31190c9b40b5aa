"""The communicator under a device communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist

from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.arguments import Timeout, Unset
from tcomm.groups.communicator import Communicator
from tcomm.memory.exchange import Store

__all__ = ["open_communicator"]


def open_communicator(
    group: dist.ProcessGroup | None,
    name: str,
    global_ranks: Sequence[int] | None,
    use_kernels: bool,
    timeout: Timeout | Unset,
) -> Communicator:
    """A communicator of the group's ranks. **Collective.**

    Args:
        group: process group; None: the default one, or without any, this process alone.
        name: of the group; may be empty.
        global_ranks: of the members; needed where torch does not know the group.
        use_kernels: whether anything but torch.distributed will be used.
        timeout: of calls that give none.

    Raises:
        ConfigError: when `global_ranks` does not fit, or is missing.
        CapabilityError: when neither kernels nor torch.distributed could be used.
        RendezvousError, GroupMismatchError: as `Communicator` does.
    """
    size = _size_of(group)
    if global_ranks is not None and len(global_ranks) != size:
        raise ConfigError(
            f"global_ranks={list(global_ranks)} has {len(global_ranks)} entries for {size} ranks"
        )
    if group is None or _is_known_to_torch(group):
        return Communicator(group, name=name, timeout=timeout)
    if global_ranks is None:
        raise ConfigError("torch does not know this process group; give global_ranks= of its members")
    if not use_kernels and size > 1:
        raise CapabilityError(
            "use_kernels=False leaves torch.distributed to do everything, and it does not know this group"
        )
    # Groups of one name meet in one order only where they have the same members.
    name = "/".join([name or "group", *map(str, global_ranks)])
    store = cast("Store", group.get_group_store())
    return Communicator.from_store(store, group.rank(), size, name=name, timeout=timeout)


def _size_of(group: dist.ProcessGroup | None) -> int:
    if group is not None:
        return group.size()
    return dist.get_world_size() if dist.is_initialized() else 1


def _is_known_to_torch(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True
