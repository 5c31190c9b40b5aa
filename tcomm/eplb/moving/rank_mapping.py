"""Maps of a group that grows or shrinks, made as wide as the larger of the two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tcomm.eplb.shapes import IntArray
from tcomm.errors import ConfigError

__all__ = ["widen_maps"]


def widen_maps(
    old: IntArray, new: IntArray, rank_mapping: Mapping[int, int] | None, world_size: int
) -> tuple[IntArray, IntArray]:
    """Both maps with the slots of every rank that takes part, by its number in the group.

    A mapping of as many ranks as the group has means that some leave: the new map, which is theirs who
    stay, gets slots of -1 for those. A shorter one means that some have joined: the old map gets slots of -1
    for them.

    Args:
        old: [L, P], the map in force.
        new: [L, P], the map to come.
        rank_mapping: from old rank to new rank, -1 for one that leaves; None: the ranks stay as they are.
        world_size: ranks of the group that moves the weights: the larger one.

    Raises:
        ConfigError: when the mapping is none of such ranks, or a map does not divide among its ranks.

    Example:
        Of 3 ranks with a slot each, the middle one leaves:
        >>> widen_maps(np.array([[0, 1, 0]]), np.array([[1, 0]]), {0: 0, 1: -1, 2: 1}, 3)[1].tolist()
        [[1, -1, 0]]
    """
    if rank_mapping is None:
        return old, new
    _check(rank_mapping, world_size)
    if len(rank_mapping) == world_size:
        stay = {before: after for before, after in rank_mapping.items() if after >= 0}
        return old, _widened("new", new, stay, len(stay), world_size)
    joined = {after: before for before, after in rank_mapping.items()}
    return _widened("old", old, joined, len(rank_mapping), world_size), new


def _check(rank_mapping: Mapping[int, int], world_size: int) -> None:
    """Whether it names all ranks of the smaller group, each once."""
    if not isinstance(rank_mapping, Mapping):
        raise ConfigError(f"rank_mapping={rank_mapping!r}; give a dict from old rank to new rank")
    count, told = len(rank_mapping), dict(rank_mapping)
    if not 0 < count <= world_size or sorted(rank_mapping) != list(range(count)):
        raise ConfigError(
            f"rank_mapping={told} must have the keys 0 to N - 1 for the N old ranks, of which a group of "
            f"{world_size} ranks has at most as many"
        )
    stay = sorted(after for after in rank_mapping.values() if after != -1)
    if count == world_size and stay != list(range(len(stay))):
        raise ConfigError(f"rank_mapping={told}: the ranks that stay are numbered 0 to {len(stay) - 1}")
    if not stay or len(set(stay)) < len(stay):
        raise ConfigError(f"rank_mapping={told}: nobody stays, or two ranks become the same one")
    if count < world_size and not (len(stay) == count and stay[0] >= 0 and stay[-1] < world_size):
        raise ConfigError(
            f"rank_mapping={told}: where ranks join, the {count} old ones all stay, as some of "
            f"0 to {world_size - 1}"
        )


def _widened(
    which: str, narrow: IntArray, column_of: Mapping[int, int], num_ranks: int, world_size: int
) -> IntArray:
    """The map with a block of slots for each rank: block `column_of[rank]` of the narrow one, or -1."""
    if narrow.ndim != 2 or narrow.shape[1] % num_ranks:
        raise ConfigError(
            f"the {which} map of {list(narrow.shape)} does not divide among {num_ranks} ranks; give one of "
            "[layers, slots] with as many slots on each"
        )
    blocks = narrow.reshape(len(narrow), num_ranks, -1)
    wide = np.full((len(narrow), world_size, blocks.shape[2]), -1, dtype=narrow.dtype)
    for rank, column in column_of.items():
        wide[:, rank] = blocks[:, column]
    return wide.reshape(len(narrow), -1)
