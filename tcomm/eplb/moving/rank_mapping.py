"""Ranks that come and go: what becomes of the numbers of ranks, and of the slots that go with them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from tcomm.eplb.shapes import IntArray
from tcomm.errors import ConfigError

__all__ = ["RankChange", "rank_change", "renumbered", "widen_maps"]


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

    def widened(self, old: IntArray, new: IntArray) -> tuple[IntArray, IntArray]:
        """Both maps with the slots of every rank that moves weights, by its number in their group.

        Args:
            old: [L, P], the map in force, of the old ranks.
            new: [L, P], the map to come, of the new ranks.

        Returns:
            Two of [L, slots of a rank * `moving_size`]; -1 in slots of a rank that a map does not know.

        Raises:
            ConfigError: when a map does not divide among its ranks.
        """
        if self.is_before:
            return old, renumbered(new, self.old_ranks, len(self.new_ranks))
        return renumbered(old, self.new_ranks, self.num_ranks), new


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
    new = _new_ranks(mapping, num_old)
    staying = sorted(rank for rank in new if rank != -1)
    is_before = len(new) == group_size
    num_ranks = len(staying) if is_before else group_size
    if not staying or len(set(staying)) != len(staying) or not 0 <= staying[0] <= staying[-1] < num_ranks:
        raise ConfigError(
            f"rank_mapping gives the new ranks {list(new)}; give different ones of 0 to {num_ranks - 1}, and "
            "-1 to those that leave"
        )
    return RankChange(new, num_ranks, is_before)


def _new_ranks(mapping: Mapping[int, int], num_old: int) -> tuple[int, ...]:
    """The new number of each old rank."""
    if isinstance(mapping, Mapping) and set(mapping) == set(range(num_old)):
        try:
            return tuple(operator.index(mapping[rank]) for rank in range(num_old))
        except TypeError:
            pass
    given = dict(mapping) if isinstance(mapping, Mapping) else mapping
    raise ConfigError(
        f"rank_mapping={given!r}; give a dict with a new rank, or -1, for each old one of 0 to {num_old - 1}"
    )


def renumbered(phy2log: IntArray, ranks: Sequence[int], num_ranks: int) -> IntArray:
    """A map after its ranks have got other numbers.

    Args:
        phy2log: [L, P].
        ranks: the new number of each rank of the map; -1 for one that is left out.
        num_ranks: ranks of the result.

    Returns:
        [L, slots of a rank * num_ranks], -1 in the slots of ranks that were not there.

    Raises:
        ConfigError: when the ranks do not share the slots evenly.
    """
    num_layers, num_slots = phy2log.shape
    if num_slots % len(ranks):
        raise ConfigError(
            f"a map of {[num_layers, num_slots]} does not divide among {len(ranks)} ranks; give one of "
            "[layers, slots] with as many slots on each"
        )
    size = num_slots // len(ranks)
    result = np.full((num_layers, num_ranks, size), -1, np.int64)
    for rank, new in enumerate(ranks):
        if new >= 0:
            result[:, new] = phy2log[:, rank * size : (rank + 1) * size]
    return result.reshape(num_layers, num_ranks * size)


def widen_maps(
    old: IntArray, new: IntArray, rank_mapping: Mapping[int, int] | None, world_size: int
) -> tuple[IntArray, IntArray]:
    """`RankChange.widened`, of a mapping; without one both stay as they are.

    Args:
        old: [L, P], the map in force.
        new: [L, P], the map to come.
        rank_mapping: as for `rank_change`, with an entry for each rank of the old map.
        world_size: ranks of the group that moves the weights.

    Raises:
        ConfigError: as `rank_change` and `RankChange.widened` do.

    Example:
        Of 3 ranks with a slot each, the middle one leaves:
        >>> widen_maps(np.array([[0, 1, 0]]), np.array([[1, 0]]), {0: 0, 1: -1, 2: 1}, 3)[1].tolist()
        [[1, -1, 0]]
    """
    if rank_mapping is None:
        return old, new
    num_old = len(rank_mapping) if isinstance(rank_mapping, Mapping) else world_size
    return rank_change(rank_mapping, num_old, world_size).widened(old, new)
