"""Ranks that come and go: what becomes of the numbers of ranks and slots, and what is told to new ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tcomm.eplb.shapes import IntArray
from tcomm.eplb.state.meeting import UNKNOWN, Errand, Meeting, Visit, fingerprint
from tcomm.errors import ConfigError

__all__ = ["RankChange", "SharedState", "rank_change", "receive_state", "renumbered", "share_state"]


@dataclasses.dataclass(frozen=True)
class RankChange:
    """What ranks become. Slots go with their rank: each rank keeps its number of slots."""

    new_ranks: tuple[int, ...]
    """Of each old rank: its new number; -1 for one that leaves."""
    num_ranks: int
    """Ranks from now on."""
    is_before: bool
    """Whether the group that moves weights still has the old ranks."""

    @property
    def is_none(self) -> bool:
        """Whether all stays as it is."""
        return self.new_ranks == tuple(range(self.num_ranks))

    @property
    def moving_size(self) -> int:
        """Ranks of the group that moves weights."""
        return len(self.new_ranks) if self.is_before else self.num_ranks

    @property
    def old_ranks(self) -> tuple[int, ...]:
        """Of each new rank: its old number; -1 for one that joins."""
        old = [-1] * self.num_ranks
        for rank, new in enumerate(self.new_ranks):
            if new >= 0:
                old[new] = rank
        return tuple(old)


def rank_change(mapping: Mapping[int, int] | None, num_old: int, group_size: int) -> RankChange:
    """What a mapping of ranks means.

    Args:
        mapping: the new rank of each old one, -1 for one that leaves; None: nothing changes.
        num_old: ranks that share the slots of the map in force.
        group_size: ranks of the group that moves weights. As many as in the mapping: those are the old
            ranks, some of which leave. Otherwise they are the new ones.

    Raises:
        ConfigError: when the mapping is none, or the numbers do not fit.
    """
    if mapping is None:
        if num_old != group_size:
            raise ConfigError(
                f"the experts are on {num_old} ranks and the group has {group_size}; give rank_mapping: the "
                "new rank of each old one"
            )
        return RankChange(tuple(range(num_old)), num_old, True)
    if sorted(mapping) != list(range(num_old)):
        raise ConfigError(
            f"rank_mapping has ranks {sorted(mapping)}; give a new one, or -1, for each of 0 to {num_old - 1}"
        )
    new = tuple(int(mapping[rank]) for rank in range(num_old))
    staying = sorted(rank for rank in new if rank != -1)
    is_before = len(new) == group_size
    num_ranks = len(staying) if is_before else group_size
    if not staying or len(set(staying)) != len(staying) or not 0 <= staying[0] <= staying[-1] < num_ranks:
        raise ConfigError(
            f"rank_mapping gives the new ranks {list(new)}; give different ones of 0 to {num_ranks - 1}, and "
            "-1 to those that leave"
        )
    return RankChange(new, num_ranks, is_before)


def renumbered(phy2log: IntArray, ranks: Sequence[int], num_ranks: int) -> IntArray:
    """A map after its ranks have got other numbers.

    Args:
        phy2log: [L, P].
        ranks: the new number of each rank of the map; -1 for one that is left out.
        num_ranks: ranks of the result.

    Returns:
        [L, slots of a rank * num_ranks], -1 in the slots of ranks that were not there.
    """
    blocks = phy2log.reshape(len(phy2log), len(ranks), -1)
    result = np.full((len(phy2log), num_ranks, blocks.shape[2]), -1, np.int64)
    for rank, new in enumerate(ranks):
        if new >= 0:
            result[:, new] = blocks[:, rank]
    return result.reshape(len(phy2log), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class SharedState:
    """What ranks that join are told."""

    loads: list[torch.Tensor]
    """Of each model: [L, E] int64, over all ranks."""
    maps: list[torch.Tensor]
    """Of each model: [L, P] int64, the map in force."""
    slots_per_rank: int
    """Slots of a layer on one rank."""
    is_single: bool
    """Whether the state that tells was built for a single model."""


def share_state(meeting: Meeting, step: int, mine: SharedState) -> SharedState:
    """Tell those who join, and sum the loads. **Collective** with `receive_state`.

    Args:
        meeting: of those who stay and those who join.
        step: how often this rank has stepped.
        mine: what this rank has counted, and the maps, which are the same on all that tell.

    Returns:
        The same with loads of all ranks.

    Raises:
        CollectiveMismatchError: when ranks are on another errand or at another step.
    """
    facts = fingerprint(*(phy2log.numpy() for phy2log in mine.maps))
    return _exchange(meeting, meeting.agree(Errand.SHARE, step, len(mine.maps), facts), mine)


def receive_state(meeting: Meeting) -> SharedState:
    """Be told, as a rank that joins. **Collective** with `share_state`.

    Raises:
        CollectiveMismatchError: when ranks are on another errand.
        ConfigError: when all ranks join: nobody has a state.
    """
    return _exchange(meeting, meeting.agree(Errand.SHARE, UNKNOWN, UNKNOWN, UNKNOWN), None)


def _exchange(meeting: Meeting, visits: list[Visit], mine: SharedState | None) -> SharedState:
    telling = [rank for rank, visit in enumerate(visits) if visit.step != UNKNOWN]
    if not telling:
        raise ConfigError("every rank of the group waits to be told loads and maps; some rank must have them")
    source = telling[0]
    facts = torch.zeros((visits[source].num_models, 5), dtype=torch.int64, device="cpu")
    if mine is not None:
        for row, load, phy2log in zip(facts, mine.loads, mine.maps, strict=True):
            numbers = [*load.shape, phy2log.shape[1], mine.slots_per_rank, mine.is_single]
            row.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    facts = meeting.hand_out(facts, source)
    loads, maps = [], []
    for index, (num_layers, num_experts, num_slots, _, _) in enumerate(facts.tolist()):
        load = torch.zeros((num_layers, num_experts), dtype=torch.int64, device="cpu")
        phy2log = torch.zeros((num_layers, num_slots), dtype=torch.int64, device="cpu")
        if mine is not None:
            load.copy_(mine.loads[index])
            phy2log.copy_(mine.maps[index])
        loads.append(meeting.total(load))
        maps.append(meeting.hand_out(phy2log, source))
    slots_per_rank, is_single = (int(number) for number in facts[0, 3:]) if len(facts) else (0, 0)
    return SharedState(loads, maps, slots_per_rank, bool(is_single))
