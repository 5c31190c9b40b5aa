"""Policies: what decides where experts go, by name."""

from __future__ import annotations

import abc

import numpy as np
import numpy.typing as npt
import torch

from tcomm.eplb.balance import balanced_slots, numbered_slots
from tcomm.eplb.incremental import nearby_map
from tcomm.eplb.maps import keeps_groups_on_nodes, logical_maps, preserved_slots, replica_counts
from tcomm.eplb.search import improved
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load, checked_map
from tcomm.eplb.tensors import load_of, shape_of
from tcomm.errors import ConfigError

__all__ = [
    "EPLB_POLICIES",
    "AbstractEplbPolicy",
    "DefaultEplbPolicy",
    "IncrementalEplbPolicy",
    "SearchEplbPolicy",
    "policy_named",
    "register_policy",
]

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AbstractEplbPolicy(abc.ABC):
    """What decides where experts go. Subclasses are registered with `register_policy`."""

    @classmethod
    @abc.abstractmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> Maps:
        """Plan.

        Args:
            weight: [L, E], load of each expert.
            num_replicas: P, slots.
            num_groups: groups of neighbouring experts.
            num_nodes: nodes.
            num_ranks: expert-parallel ranks.
            old_global_expert_indices: [L, P], the map in force, or None.

        Returns:
            phy2log [L, P], log2phy [L, E, X] filled up with -1, logcnt [L, E].
        """

    @classmethod
    def place_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The first result of `rebalance_experts` alone: [L, P], as newer vllm.distributed has it."""
        return cls.rebalance_experts(
            weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
        )[0]


class DefaultEplbPolicy(AbstractEplbPolicy):
    """The plan of `tcomm.eplb.rebalance_experts`, in which experts that stay on a GPU keep their slots."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> Maps:
        """Plan.

        Args:
            weight: [L, E], load of each expert; any real dtype and device; taken as float32.
            num_replicas: P, slots; a multiple of `num_ranks`, and E or more.
            num_groups: groups of neighbouring experts.
            num_nodes: nodes; where they do not divide the groups, any expert may go anywhere.
            num_ranks: expert-parallel ranks.
            old_global_expert_indices: [L, P], the map in force, in which -1 holds no expert. A layer without
                load keeps it, if it has all experts.

        Returns:
            int64 on the device of `weight`: phy2log [L, P]; log2phy [L, E, P - E + 1] in the order of
            replicas, filled up with -1; logcnt [L, E].

        Raises:
            ConfigError: when the numbers do not divide, a load is negative, infinite or not a number, or the
                old map is of another shape.
        """
        load = load_of(weight)
        shape = shape_of(load, num_replicas, num_groups, num_nodes, num_ranks)
        values = checked_load(load, np.float32).astype(np.float64)
        old = _old_map(old_global_expert_indices, values, shape)
        phy2log, numbers, logcnt = balanced_slots(values, shape)
        if old is not None:
            source = preserved_slots(old, phy2log, shape.num_gpus)
            phy2log, numbers = (np.take_along_axis(part, source, axis=1) for part in (phy2log, numbers))
        log2phy = numbered_slots(phy2log, numbers, shape)
        if old is not None and (kept := _idle_and_whole(values, old)).any():
            phy2log[kept] = old[kept]
            log2phy[kept], logcnt[kept] = logical_maps(old[kept], shape.num_experts, log2phy.shape[2])
        return _as_tensors((phy2log, log2phy, logcnt), weight.device)


class SearchEplbPolicy(AbstractEplbPolicy):
    """The default plan, improved by local search: swaps of slots, and other numbers of replicas."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> Maps:
        """Plan; arguments, results and errors are those of `DefaultEplbPolicy`, and loads are float64.

        Slots of an expert rise in log2phy.
        """
        load = load_of(weight)
        shape = shape_of(load, num_replicas, num_groups, num_nodes, num_ranks)
        values = checked_load(load, np.float64)
        old = _old_map(old_global_expert_indices, values, shape)
        phy2log = improved(balanced_slots(values, shape)[0], values, shape)
        if old is not None:
            phy2log = np.take_along_axis(phy2log, preserved_slots(old, phy2log, shape.num_gpus), axis=1)
            kept = _idle_and_whole(values, old)
            phy2log[kept] = old[kept]
        return _as_tensors(_maps_of(phy2log, shape), weight.device)


class IncrementalEplbPolicy(AbstractEplbPolicy):
    """The best map near the one in force: of a layer's slots at most a quarter get their expert elsewhere."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> Maps:
        """Plan; as `SearchEplbPolicy` where there is no map in force, or not one with all experts."""
        if old_global_expert_indices is not None:
            load = load_of(weight)
            shape = shape_of(load, num_replicas, num_groups, num_nodes, num_ranks)
            values = checked_load(load, np.float64)
            old = _old_map(old_global_expert_indices, values, shape)
            assert old is not None
            if bool(_whole(old, shape.num_experts).all()):
                held = shape if keeps_groups_on_nodes(old, shape.planned()) else shape.everywhere()
                phy2log = nearby_map(values, old, held, shape.num_replicas // 4)
                return _as_tensors(_maps_of(phy2log, shape), weight.device)
        return SearchEplbPolicy.rebalance_experts(
            weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
        )


def _old_map(old: torch.Tensor | None, load: LoadArray, shape: Shape) -> IntArray | None:
    if old is None:
        return None
    given = old.detach().to("cpu").numpy()
    return checked_map("old_global_expert_indices", given, len(load), shape, whole=False)


def _whole(old: IntArray, num_experts: int) -> npt.NDArray[np.bool_]:
    """[L]: whether each expert is somewhere, and each slot has one."""
    counts = replica_counts(old, num_experts)
    return np.logical_and((counts > 0).all(axis=1), (old >= 0).all(axis=1))


def _idle_and_whole(load: FloatArray, old: IntArray) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = ~load.any(axis=1) & _whole(old, load.shape[1])
    return mask


def _maps_of(phy2log: IntArray, shape: Shape) -> tuple[IntArray, IntArray, IntArray]:
    width = shape.num_replicas - shape.num_experts + 1
    return phy2log, *logical_maps(phy2log, shape.num_experts, width)


def _as_tensors(maps: tuple[IntArray, IntArray, IntArray], device: torch.device) -> Maps:
    phy2log, log2phy, logcnt = (torch.from_numpy(array).to(device) for array in maps)
    return phy2log, log2phy, logcnt


EPLB_POLICIES: dict[str, type[AbstractEplbPolicy]] = {
    "default": DefaultEplbPolicy,
    "search": SearchEplbPolicy,
    "incremental": IncrementalEplbPolicy,
}
"""Policies by name."""


def register_policy(name: str, policy: type[AbstractEplbPolicy]) -> None:
    """Let a policy be found by a name.

    Args:
        name: that is not taken.
        policy: a subclass of `AbstractEplbPolicy`.

    Raises:
        ConfigError: when the name is empty or taken, or it is no such class.
    """
    if not isinstance(policy, type) or not issubclass(policy, AbstractEplbPolicy):
        raise ConfigError(f"policy {policy!r} is no subclass of AbstractEplbPolicy")
    if not name or name in EPLB_POLICIES:
        raise ConfigError(f"policy name {name!r} is empty or taken; there are {', '.join(EPLB_POLICIES)}")
    EPLB_POLICIES[name] = policy


def policy_named(name: str) -> type[AbstractEplbPolicy]:
    """The policy of that name.

    Raises:
        ConfigError: when there is none; says which there are.
    """
    if name not in EPLB_POLICIES:
        raise ConfigError(f"policy {name!r} is unknown; there are {', '.join(EPLB_POLICIES)}")
    return EPLB_POLICIES[name]
