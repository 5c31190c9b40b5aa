"""How even a load can be made at best, whatever the plan."""

from __future__ import annotations

import functools
import math

import numpy as np

from tcomm.eplb.replicas import replicate
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load

__all__ = ["balancedness_bound"]

_MOST_PARTITIONS = 3000
"""Ways to put groups on nodes that are all tried."""


def balancedness_bound(load: LoadArray, shape: Shape) -> FloatArray:
    """What no plan of that shape exceeds when replicas share their expert's tokens evenly.

    The busiest GPU has the mean load or more, and no less than the heaviest replica when slots are given to
    experts as well as can be. Where groups stay on nodes: no less than a GPU's part of the busiest node when
    groups are put on nodes as well as can be, nor than the heaviest replica of any group if it had all the
    redundant slots of its node.

    Args:
        load: [L, E].
        shape: the numbers.

    Returns:
        [L], from 0 to 1; 1 for a layer without load.

    Raises:
        ConfigError: when the load is none.
    """
    values, shape = checked_load(load, np.float64), shape.planned()
    mean = values.sum(axis=1) / shape.num_gpus
    peak = np.maximum(mean, _heaviest_replica(values, shape))
    if shape.num_nodes > 1:
        groups = shape.by_group(values).sum(axis=2)
        node = _busiest_node(groups, shape.num_nodes)
        peak = np.maximum(peak, node / (shape.num_gpus // shape.num_nodes))
    bound: FloatArray = np.ones_like(mean)
    np.divide(mean, peak, out=bound, where=peak > 0)
    return bound


def _heaviest_replica(load: FloatArray, shape: Shape) -> FloatArray:
    if shape.num_nodes == 1:
        groups, redundant = load[:, None], shape.num_replicas - shape.num_experts
    else:
        groups = shape.by_group(load)
        redundant = (shape.num_replicas - shape.num_experts) // shape.num_nodes
    rows = groups.reshape(len(load) * groups.shape[1], groups.shape[2])
    _, _, counts = replicate(rows, groups.shape[2] + redundant)
    heaviest: FloatArray = (groups / counts.reshape(groups.shape)).max(axis=(1, 2))
    return heaviest


def _busiest_node(groups: FloatArray, num_nodes: int) -> FloatArray:
    """[L]: its load, or less: by all partitions where they are few, else by what one node cannot escape."""
    num_groups = groups.shape[1]
    size = num_groups // num_nodes
    if _num_partitions(num_groups, num_nodes) <= _MOST_PARTITIONS:
        best = np.full(len(groups), np.inf)
        for partition in _partitions(num_groups, num_nodes):
            best = np.minimum(best, groups[:, partition].sum(axis=2).max(axis=1))
        return best
    falling = -np.sort(-groups, axis=1)
    lowest: FloatArray = groups.sum(axis=1) / num_nodes
    for together in range(1, size + 1):
        # Of this many heaviest groups some node has `together` or more, and fills up with the lightest.
        last = num_nodes * (together - 1) + 1
        inside = falling[:, last - together : last].sum(axis=1)
        lowest = np.maximum(lowest, inside + falling[:, num_groups - (size - together) :].sum(axis=1))
    return lowest


def _num_partitions(num_items: int, num_bins: int) -> int:
    size = num_items // num_bins
    same: int = math.factorial(size) ** num_bins * math.factorial(num_bins)
    return math.factorial(num_items) // same


@functools.cache
def _partitions(num_items: int, num_bins: int) -> tuple[IntArray, ...]:
    """All ways to put items into bins of equal size whose order does not matter: each [bins, size]."""
    size = num_items // num_bins
    found: list[list[list[int]]] = [[]]
    for item in range(num_items):
        grown = []
        for bins in found:
            for index, members in enumerate(bins):
                if len(members) < size:
                    grown.append([*bins[:index], [*members, item], *bins[index + 1 :]])
            if len(bins) < num_bins:
                grown.append([*bins, [item]])
        found = grown
    return tuple(np.array(bins) for bins in found)
