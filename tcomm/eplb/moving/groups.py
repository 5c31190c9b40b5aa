"""The ranks that move experts, from a group of any kind."""

from __future__ import annotations

import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.moe.members import members_of
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.setup import Membership
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["ExpertGroup", "members_that_move", "rank_of", "size_of"]

ExpertGroup = GroupCoordinator | dist.ProcessGroup | StatelessProcessGroup
"""An expert parallel group."""


def size_of(group: ExpertGroup) -> int:
    """Number of ranks.

    Raises:
        ConfigError: when it is no group that this rank belongs to.
    """
    if isinstance(group, GroupCoordinator | StatelessProcessGroup):
        return group.world_size
    if isinstance(group, dist.ProcessGroup):
        return group.size()
    raise ConfigError(
        f"{group!r} is no expert parallel group of this rank; give a GroupCoordinator, a process group or a "
        "StatelessProcessGroup"
    )


def rank_of(group: ExpertGroup) -> int:
    """This process, in the group.

    Raises:
        ConfigError: as `size_of` does.
    """
    size_of(group)
    if isinstance(group, GroupCoordinator):
        return group.rank_in_group
    return group.rank if isinstance(group, StatelessProcessGroup) else group.rank()


def members_that_move(group: ExpertGroup) -> Membership:
    """Who takes part. Made in the same order on every rank.

    Raises:
        ConfigError: as `size_of` does.
    """
    size_of(group)
    return members_of(group.cpu_group if isinstance(group, GroupCoordinator) else group, "experts")
