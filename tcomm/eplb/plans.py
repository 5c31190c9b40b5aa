"""A plan: where the experts go, how good that is, and why."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from tcomm.eplb.bound import balancedness_bound
from tcomm.eplb.incremental import CopyCosts, nearby_map
from tcomm.eplb.maps import balancedness, initial_map, keeps_groups_on_nodes, logical_maps
from tcomm.eplb.migration import Migration, migration
from tcomm.eplb.policies import policy_named
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load, checked_map
from tcomm.errors import ConfigError

__all__ = ["Plan", "make_plan", "plan_of", "replan", "where_experts_go"]

_ACROSS = "the map has groups on several nodes, so any expert may be on any GPU"


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where the experts go, how good that is, and why."""

    phy2log: IntArray
    """[L, P]: the expert in each slot."""
    log2phy: IntArray
    """[L, E, P - E + 1]: the slots of each expert, rising, filled up with -1."""
    logcnt: IntArray
    """[L, E]: replicas of each expert."""
    balancedness: FloatArray
    """[L]: mean load of a GPU over that of the busiest one."""
    bound: FloatArray
    """[L]: what no plan of this shape exceeds."""
    shape: Shape
    """The numbers planned for."""
    seconds: float
    """Time that planning took."""
    policy: str
    """Name of what made it."""
    reason: str
    """Why it is this one."""

    def diff(self, old: IntArray) -> Migration:
        """What has to be copied to get there from another map.

        Args:
            old: [L, P], the map in force; -1 holds no expert.

        Raises:
            ConfigError: when it is of another shape.
        """
        return migration(old, self.phy2log, self.shape.num_gpus)


def plan_of(
    phy2log: IntArray, load: LoadArray, shape: Shape, *, seconds: float, policy: str, reason: str
) -> Plan:
    """The plan with a map, measured on a load.

    Args:
        phy2log: [L, P].
        load: [L, E].
        shape: the numbers.
        seconds: time that it took to find the map.
        policy: what found it.
        reason: why.

    Raises:
        ConfigError: when map or load is none.
    """
    values = checked_load(load, np.float64)
    slots = checked_map("phy2log", phy2log, len(values), shape)
    log2phy, logcnt = logical_maps(slots, shape.num_experts, shape.num_replicas - shape.num_experts + 1)
    return Plan(
        slots, log2phy, logcnt,
        balancedness(slots, values, shape.num_gpus), balancedness_bound(values, shape), shape,
        seconds, policy, reason,
    )  # fmt: skip


def _of_shape(load: LoadArray, shape: Shape) -> FloatArray:
    values: FloatArray = checked_load(load, np.float64)
    if values.shape[1] != shape.num_experts:
        raise ConfigError(f"the load is of {values.shape[1]} experts; the shape has {shape.num_experts}")
    return values


def make_plan(
    load: LoadArray, shape: Shape, *, policy: str = "search", current: LoadArray | None = None
) -> Plan:
    """Plan for a load, with no regard to how much has to be copied.

    A layer without load stays as it is in `current`; without that it gets the initial map. Where that map or
    the policy puts a group on several nodes, the plan counts as global.

    Args:
        load: [L, E], tokens that chose each expert.
        shape: the numbers.
        policy: a name in `EPLB_POLICIES`.
        current: [L, P], the map in force, whose slots are kept where that makes no difference; or None.

    Raises:
        ConfigError: when load, map or policy make no sense, or the policy answers with what is no map.
    """
    values = _of_shape(load, shape)
    old = None if current is None else checked_map("the current map", current, len(values), shape)
    chosen = policy_named(policy)
    start = time.perf_counter()
    phy2log, *_ = chosen.rebalance_experts(
        torch.from_numpy(values), shape.num_replicas, shape.num_groups, shape.num_nodes, shape.num_gpus,
        None if old is None else torch.from_numpy(old),
    )  # fmt: skip
    slots = checked_map(f"what policy {policy!r} made", phy2log.cpu().numpy(), len(values), shape)
    idle = ~values.any(axis=1)
    slots[idle] = initial_map(shape) if old is None else old[idle]
    seconds = time.perf_counter() - start
    reason = where_experts_go(shape)
    if not keeps_groups_on_nodes(slots, shape.planned()):
        shape, reason = shape.everywhere(), f"global: {_ACROSS}"
    return plan_of(slots, values, shape, seconds=seconds, policy=policy, reason=reason)


def where_experts_go(shape: Shape) -> str:
    """Where a plan of that shape may put them, and why."""
    if not shape.is_hierarchical:
        return (
            f"global: {shape.num_nodes} nodes do not divide {shape.num_groups} groups, so any expert may be "
            "on any GPU"
        )
    if shape.num_nodes == 1:
        return "one node: any expert may be on any GPU"
    return f"hierarchical: each of {shape.num_groups} groups is on one of {shape.num_nodes} nodes"


def replan(
    load: LoadArray,
    shape: Shape,
    *,
    current: LoadArray,
    max_moves: int | None = None,
    costs: CopyCosts | None = None,
) -> Plan:
    """Plan for a load from the map in force, copying little.

    Where the map in force does not keep groups on nodes, neither does the plan.

    Args:
        load: [L, E], tokens that chose each expert.
        shape: the numbers.
        current: [L, P], the map in force.
        max_moves: slots of a layer whose expert is copied from another GPU, at most; None: any number.
        costs: what a copy costs and for how long the plan will be used; None: copies are free.

    Raises:
        ConfigError: when load, map or budget make no sense.
    """
    values = _of_shape(load, shape)
    old = checked_map("the current map", current, len(values), shape)
    start = time.perf_counter()
    held = shape.planned()
    told = ""
    if not keeps_groups_on_nodes(old, held):
        held, told = shape.everywhere(), f"; {_ACROSS}"
    slots = nearby_map(values, old, held, max_moves, costs)
    seconds = time.perf_counter() - start
    limits = "no limit" if max_moves is None else f"at most {max_moves} copies a layer"
    paying = "" if costs is None else ", as long as they pay"
    return plan_of(
        slots, values, held, seconds=seconds, policy="incremental",
        reason=f"from the current map: {limits}{paying}{told}",
    )  # fmt: skip
