"""The plan of `rebalance_experts` for all layers at once, equal to that of `tcomm.eplb.reference`."""

from __future__ import annotations

import numpy as np

from tcomm.eplb.packing import pack
from tcomm.eplb.replicas import replicate
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load

__all__ = ["balanced_maps", "balanced_slots", "numbered_slots"]


def _experts_by_node(load: FloatArray, shape: Shape) -> IntArray:
    """[L, nodes, experts of a node]: groups in the order of packing, experts rising in each."""
    num_layers, size = len(load), shape.num_experts // shape.num_groups
    group_load = shape.by_group(load).sum(axis=2)
    node, position = pack(group_load, shape.num_nodes)
    place = node * (shape.num_groups // shape.num_nodes) + position
    groups = np.empty((num_layers, shape.num_groups), np.int64)
    np.put_along_axis(groups, place, np.arange(shape.num_groups)[None], axis=1)
    experts = groups[:, :, None] * size + np.arange(size)
    return experts.reshape(num_layers, shape.num_nodes, shape.num_experts // shape.num_nodes)


def balanced_slots(load: FloatArray, shape: Shape) -> tuple[IntArray, IntArray, IntArray]:
    """What each slot holds: groups to nodes, replicas within a node, replicas to its GPUs.

    Args:
        load: [L, E], checked.
        shape: the numbers; nodes are taken for one where groups cannot be kept on them.

    Returns:
        phy2log [L, P], the number of each slot's replica among its expert's [L, P], logcnt [L, E].
    """
    shape = shape.planned()
    num_layers, num_nodes = len(load), shape.num_nodes
    experts = _experts_by_node(load, shape).reshape(num_layers * num_nodes, shape.num_experts // num_nodes)
    layers = np.repeat(np.arange(num_layers), num_nodes)[:, None]
    weights = load[layers, experts]
    local, numbers, counts = replicate(weights, shape.num_replicas // num_nodes)
    replica_load = np.take_along_axis(weights / counts, local, axis=1)
    gpu, position = pack(replica_load, shape.num_gpus // num_nodes)
    slot = gpu * shape.slots_per_gpu + position
    phy2log, number_of_slot = np.empty((2, *slot.shape), np.int64)
    np.put_along_axis(phy2log, slot, np.take_along_axis(experts, local, axis=1), axis=1)
    np.put_along_axis(number_of_slot, slot, numbers, axis=1)
    logcnt = np.empty((num_layers, shape.num_experts), np.int64)
    logcnt[layers, experts] = counts
    whole = (num_layers, shape.num_replicas)
    return phy2log.reshape(whole), number_of_slot.reshape(whole), logcnt


def balanced_maps(load: LoadArray, shape: Shape) -> tuple[IntArray, IntArray, IntArray]:
    """The plan for a load.

    Args:
        load: [L, E], of any real dtype; taken as float32, as `reference_maps` does.
        shape: the numbers.

    Returns:
        phy2log [L, P], log2phy [L, E, P - E + 1] filled up with -1, logcnt [L, E].

    Raises:
        ConfigError: when the load is none.
    """
    weights = checked_load(load, np.float32).astype(np.float64)
    phy2log, numbers, logcnt = balanced_slots(weights, shape)
    return phy2log, numbered_slots(phy2log, numbers, shape), logcnt


def numbered_slots(phy2log: IntArray, numbers: IntArray, shape: Shape) -> IntArray:
    """The slots of each expert in the order of its replicas' numbers.

    Args:
        phy2log: [L, P].
        numbers: [L, P], of each slot's replica among its expert's.
        shape: the numbers.

    Returns:
        [L, E, P - E + 1] filled up with -1.
    """
    width = shape.num_replicas - shape.num_experts + 1
    log2phy = np.full((len(phy2log), shape.num_experts, width), -1, np.int64)
    log2phy[np.arange(len(phy2log))[:, None], phy2log, numbers] = np.arange(shape.num_replicas)
    return log2phy
