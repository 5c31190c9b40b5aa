"""What the ranks of a group tell one another, never without saying where they are."""

from __future__ import annotations

import enum
import zlib
from typing import NamedTuple

import numpy as np
import torch

from tcomm.eplb.shapes import IntArray
from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.memory.probe import host_identity

__all__ = ["UNKNOWN", "Errand", "Meeting", "Visit", "checked_group", "fingerprint"]

UNKNOWN = -1
"""What a rank that joins says of what it cannot know."""


class Errand(enum.IntEnum):
    """What ranks meet for."""

    STATISTICS = 0
    """How even is the load?"""
    LOADS = 1
    """What is the load?"""
    PLAN = 2
    """Where do experts go?"""
    MOVE = 3
    """There they go."""
    SHARE = 4
    """What is the load, and where are experts? For ranks that join."""
    PROFILE = 5
    """How much memory does it take?"""
    SWITCH = 6
    """Whose layers are ready?"""


_COMPARED = 4
"""Leading numbers of a visit in which ranks must not differ."""


class Visit(NamedTuple):
    """What a rank says of itself when ranks meet."""

    errand: int
    """What for: an `Errand`."""
    step: int
    """How often it has stepped."""
    num_models: int
    """Models that it balances."""
    facts: int
    """Fingerprint of the loads and maps that it goes by."""
    host: int
    """The same for ranks on one node."""
    num_ready: int = 0
    """How far its worker is; not compared, as the host is not."""

    def __str__(self) -> str:
        """One line of the table in an error."""
        where = "joins" if self.step == UNKNOWN else f"step {self.step}"
        return (
            f"{where}, {Errand(self.errand).name.lower()}, {self.num_models} models, facts {self.facts:08x}"
        )

    def agrees(self, other: Visit) -> bool:
        """Whether both are at the same place, as far as both know."""
        return all(
            mine == theirs or UNKNOWN in {mine, theirs}
            for mine, theirs in zip(self[:_COMPARED], other[:_COMPARED], strict=True)
        )


def fingerprint(*facts: IntArray) -> int:
    """32 bits over loads and maps: the same for the same ones."""
    value = 0
    for array in facts:
        value = zlib.crc32(np.ascontiguousarray(array, np.int64).tobytes(), value)
    return value


def checked_group(group: object) -> GroupCoordinator:
    """The group, when it is one whose ranks can meet.

    Raises:
        ConfigError: when it is not.
    """
    if not isinstance(group, GroupCoordinator):
        raise ConfigError(f"{group!r} is no GroupCoordinator; give the expert parallel group")
    return group


class Meeting:
    """Collectives of a group's ranks over numbers in host memory.

    Args:
        group: whose control communicator is used, in the order of the caller's thread.

    Raises:
        ConfigError: when it is no `GroupCoordinator`.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = checked_group(group)
        self.rank = group.rank_in_group
        self.num_ranks = group.world_size

    def agree(
        self, errand: Errand, step: int, num_models: int = 1, facts: int = 0, num_ready: int = 0
    ) -> list[Visit]:
        """Compare where the ranks are. **Collective.**

        Args:
            errand: what this rank comes for.
            step: how often it has stepped; or `UNKNOWN`, as each of the following.
            num_models: models that it balances.
            facts: fingerprint of the loads and maps that it goes by.
            num_ready: how far its worker is; may differ.

        Returns:
            What each rank said.

        Raises:
            ConfigError: when the group is destroyed.
            CollectiveMismatchError: on every rank, when they differ in anything that is compared.
            PeerLostError, PeerTimeoutError: when a rank did not come; names it.
        """
        mine = Visit(errand, step, num_models, facts, zlib.crc32(host_identity().encode()), num_ready)
        row = torch.tensor(mine, dtype=torch.int64, device="cpu")
        control = self.group.control
        if self.group.destroyed:
            raise ConfigError(f"Group {self.group.unique_name} is destroyed.")
        gathered = row if control is None else control.all_gather_single(row)
        visits = [Visit(*numbers) for numbers in gathered.view(-1, len(mine)).tolist()]
        knowing = max(visits, key=lambda visit: visit.step)
        if not all(knowing.agrees(visit) for visit in visits):
            self._refuse(visits)
        return visits

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks. **Collective.**

        Args:
            values: int64 in host memory, of one shape on every rank.
        """
        return self.group.cpu_all_reduce_(values.clone())

    def hand_out(self, values: torch.Tensor, source: int) -> torch.Tensor:
        """The values of rank `source`, written into everybody's. **Collective.**"""
        return self.group.broadcast(values, source)

    def _refuse(self, visits: list[Visit]) -> None:
        mine = visits[self.rank]
        others = [rank for rank, visit in enumerate(visits) if not mine.agrees(visit)]
        lines = [f"balancing experts in group {self.group.unique_name!r}: the ranks are at different places"]
        lines += [f"  rank {rank}: {visit}" for rank, visit in enumerate(visits)]
        lines.append(
            "every rank must step and rearrange equally often, steps without tokens included, by the same "
            "loads, maps and settings"
        )
        raise CollectiveMismatchError(
            "\n".join(lines), group=self.group.unique_name, op="eplb", seq=mine.step, rank=self.rank,
            peers=others,
        )  # fmt: skip
