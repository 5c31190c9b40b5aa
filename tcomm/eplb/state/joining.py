"""With which map a rank begins: the first one, or that of the others whom it joins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from tcomm.eplb.shapes import IntArray, Shape, checked_map
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.errors import ConfigError

__all__ = ["Joining", "build_initial_global_physical_to_logical_map"]


def build_initial_global_physical_to_logical_map(
    num_routed_experts: int, num_redundant_experts: int
) -> list[int]:
    """Which expert is in each slot at first: each of them, then the first ones again."""
    again = (slot % num_routed_experts for slot in range(num_redundant_experts))
    return [*range(num_routed_experts), *again]


@dataclasses.dataclass(frozen=True, eq=False)
class Joining:
    """What a rank that joins was told; all None for one that does not."""

    load: torch.Tensor | None
    """[L, E] int64, over all ranks."""
    old_indices: torch.Tensor | None
    """[L, P], the map in force, with the slots of the old ranks."""
    rank_mapping: Mapping[int, int] | None
    """The new rank of each old one; None: there are as many as before."""

    def first_map(self, model: MixtureOfExperts) -> IntArray:
        """The map in force: [L, P], with the slots of the old ranks where this rank joins.

        Raises:
            ConfigError: when a part is missing, or the map is none.
        """
        if self.load is None:
            if self.old_indices is not None or self.rank_mapping is not None:
                raise ConfigError("an old map and a rank_mapping go with a global_expert_load; give that too")
            first = build_initial_global_physical_to_logical_map(
                model.num_routed_experts, model.num_redundant_experts
            )
            return np.tile(np.array(first, np.int64), (model.num_moe_layers, 1))
        if not isinstance(self.old_indices, torch.Tensor):
            raise ConfigError("a global_expert_load goes with old_global_expert_indices; give that map too")
        local = model.num_local_physical_experts
        mapping = self.rank_mapping
        num_ranks = model.num_physical_experts // local if mapping is None else len(mapping)
        shape = Shape(model.num_logical_experts, num_ranks * local, num_gpus=num_ranks)
        given = self.old_indices.cpu().numpy()
        return checked_map("old_global_expert_indices", given, model.num_moe_layers, shape, whole=False)
