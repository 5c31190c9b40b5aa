"""Who takes part in an exchange, from a group of either kind."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist

from tcomm.groups.setup import Membership, from_process_group, from_store
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.memory.exchange import Store

__all__ = ["members_of"]


def members_of(group: dist.ProcessGroup | StatelessProcessGroup, name: str) -> Membership:
    """The ranks of a group. Exchanges of one name are made in the same order on every rank.

    Args:
        group: process group, or a stateless group.
        name: for errors, and to tell groups apart.

    Raises:
        ConfigError: when it is neither.
    """
    if isinstance(group, StatelessProcessGroup):
        return from_store(cast("Store", group.store), group.rank, group.world_size, name)
    return from_process_group(group, name)
