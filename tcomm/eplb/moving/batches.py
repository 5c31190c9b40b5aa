"""Transfers between ranks put together by pairs of ranks, in batches in which each rank has one partner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tcomm.eplb.migration import LayerMoves, migration
from tcomm.errors import ConfigError

__all__ = [
    "MigrationFlow",
    "layer_moves",
    "schedule_migration_batches",
    "schedule_migration_batches_for_layers",
]


@dataclasses.dataclass(frozen=True)
class MigrationFlow:
    """What one rank sends to another."""

    src_rank: int
    """Sender."""
    dst_rank: int
    """Receiver."""
    expert_ids: tuple[int, ...]
    """Experts, in ascending order."""


def layer_moves(num_local_experts: int, old_indices: npt.ArrayLike, new_indices: npt.ArrayLike) -> LayerMoves:
    """What one layer needs; see `migration`.

    Args:
        num_local_experts: slots of a rank.
        old_indices: [P], the map in force; -1 holds no expert.
        new_indices: [P], the map to come.

    Raises:
        ConfigError: when the maps are of different shapes, or do not divide among ranks of so many slots.
    """
    old, new = np.asarray(old_indices), np.asarray(new_indices)
    if old.ndim != 1 or old.shape != new.shape or num_local_experts < 1 or len(old) % num_local_experts:
        raise ConfigError(
            f"maps of {list(old.shape)} and {list(new.shape)} for ranks of {num_local_experts} slots; give "
            "two of [slots], a multiple of those of a rank"
        )
    if not len(old):
        return LayerMoves((), (), (), ())
    return migration(old[None], new[None], len(old) // num_local_experts).layers[0]


def schedule_migration_batches(
    num_local_experts: int, old_indices: npt.ArrayLike, new_indices: npt.ArrayLike
) -> list[list[MigrationFlow]]:
    """The transfers of one layer in batches; in a batch each rank occurs once at most, at either end.

    Flows are taken in the order of their first expert, then of their receivers; each goes into the first
    batch in which neither of its ranks occurs.

    Args:
        num_local_experts: slots of a rank.
        old_indices: [P], the map in force; -1 holds no expert.
        new_indices: [P], the map to come.

    Raises:
        ConfigError: as `layer_moves` does.

    Example:
        Two ranks of two slots exchange an expert: a batch for each direction.
        >>> [[(f.src_rank, f.dst_rank, f.expert_ids) for f in b]
        ...  for b in schedule_migration_batches(2, [0, 1, 2, 3], [0, 2, 1, 3])]
        [[(0, 1, (1,))], [(1, 0, (2,))]]
    """
    moves = layer_moves(num_local_experts, old_indices, new_indices)
    copies = [copy for round_ in moves.rounds for copy in round_]
    flows: dict[tuple[int, int], list[int]] = {}
    for copy in sorted(copies, key=lambda copy: (copy.expert, copy.target // num_local_experts)):
        pair = copy.source // num_local_experts, copy.target // num_local_experts
        flows.setdefault(pair, []).append(copy.expert)
    batches: list[list[MigrationFlow]] = []
    busy: list[set[int]] = []
    for pair, experts in flows.items():
        number = next((n for n, ranks in enumerate(busy) if ranks.isdisjoint(pair)), len(busy))
        if number == len(busy):
            batches.append([])
            busy.append(set())
        batches[number].append(MigrationFlow(*pair, tuple(experts)))
        busy[number].update(pair)
    return batches


def schedule_migration_batches_for_layers(
    num_local_experts: int, old_indices: Sequence[npt.ArrayLike], new_indices: Sequence[npt.ArrayLike]
) -> list[list[list[MigrationFlow]]]:
    """`schedule_migration_batches` of each layer.

    Args:
        num_local_experts: slots of a rank.
        old_indices: [L, P], the map in force.
        new_indices: [L, P], the map to come.

    Raises:
        ConfigError: as `layer_moves` does, or when the maps have different numbers of layers.
    """
    if len(old_indices) != len(new_indices):
        raise ConfigError(f"maps of {len(old_indices)} and {len(new_indices)} layers; give as many of both")
    pairs = zip(old_indices, new_indices, strict=True)
    return [schedule_migration_batches(num_local_experts, old, new) for old, new in pairs]
