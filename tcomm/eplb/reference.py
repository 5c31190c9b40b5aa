"""The plan of `rebalance_experts` in plain loops, one layer after another: what the fast one must equal.

Loads are taken as float32; sums and quotients are float64. Of items with equal weight the first comes first,
of equal bins the lowest, of equal experts the first: the result is the same on every machine.
"""

from __future__ import annotations

import numpy as np

from tcomm.eplb.shapes import IntArray, LoadArray, Shape

__all__ = ["reference_maps", "reference_preserved"]


def _pack(weights: list[float], num_bins: int) -> list[tuple[int, int]]:
    """For each item its bin and its position there. Every bin gets as many items."""
    capacity = len(weights) // num_bins
    if capacity == 1:
        return [(item, 0) for item in range(num_bins)]
    load, count = [0.0] * num_bins, [0] * num_bins
    places = [(0, 0)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((b for b in range(num_bins) if count[b] < capacity), key=load.__getitem__)
        places[item] = (lightest, count[lightest])
        load[lightest] += weights[item]
        count[lightest] += 1
    return places


def _replicate(weights: list[float], num_slots: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Each replica as (expert, number), and the number of replicas of each expert."""
    replicas = [(expert, 0) for expert in range(len(weights))]
    count = [1] * len(weights)
    while len(replicas) < num_slots:
        heaviest = max(range(len(weights)), key=lambda e: weights[e] / count[e])
        replicas.append((heaviest, count[heaviest]))
        count[heaviest] += 1
    return replicas, count


def _experts_of_nodes(weights: list[float], shape: Shape) -> list[list[int]]:
    size = shape.num_experts // shape.num_groups
    load = [sum(weights[group * size : (group + 1) * size]) for group in range(shape.num_groups)]
    places = _pack(load, shape.num_nodes)
    nodes = []
    for node in range(shape.num_nodes):
        groups = sorted((position, g) for g, (bin_, position) in enumerate(places) if bin_ == node)
        nodes.append([group * size + i for _, group in groups for i in range(size)])
    return nodes


def reference_maps(load: LoadArray, shape: Shape) -> tuple[IntArray, IntArray, IntArray]:
    """The plan for a load.

    Args:
        load: [L, E].
        shape: numbers of experts, replicas, groups, nodes and GPUs.

    Returns:
        phy2log [L, P], log2phy [L, E, P - E + 1] filled up with -1, logcnt [L, E].
    """
    shape = shape.planned()
    num_layers, num_experts, num_slots = len(load), shape.num_experts, shape.num_replicas
    phy2log = np.zeros((num_layers, num_slots), np.int64)
    log2phy = np.full((num_layers, num_experts, num_slots - num_experts + 1), -1, np.int64)
    logcnt = np.zeros((num_layers, num_experts), np.int64)
    slots_of_node, gpus_of_node = num_slots // shape.num_nodes, shape.num_gpus // shape.num_nodes
    for layer, row in enumerate(load.astype(np.float32).tolist()):
        for node, experts in enumerate(_experts_of_nodes(row, shape)):
            replicas, count = _replicate([row[e] for e in experts], slots_of_node)
            places = _pack([row[experts[i]] / count[i] for i, _ in replicas], gpus_of_node)
            for (i, number), (gpu, position) in zip(replicas, places, strict=True):
                slot = node * slots_of_node + gpu * shape.slots_per_gpu + position
                phy2log[layer, slot] = experts[i]
                log2phy[layer, experts[i], number] = slot
            logcnt[layer, experts] = count
    return phy2log, log2phy, logcnt


def reference_preserved(old: IntArray, new: IntArray, num_gpus: int) -> IntArray:
    """Where the entries of each GPU go, so that experts which stay on it keep their slots.

    Args:
        old: [L, P], the map in force.
        new: [L, P], the map to come.
        num_gpus: ranks that share the slots.

    Returns:
        [L, P]: for each slot the slot of `new` whose entry goes there, on the same GPU.
    """
    size = new.shape[1] // num_gpus
    source = np.zeros_like(new)
    for layer in range(len(new)):
        for start in range(0, new.shape[1], size):
            slots = range(start, start + size)
            unused, chosen = list(slots), {}
            for slot in slots:
                same = [entry for entry in unused if new[layer, entry] == old[layer, slot]]
                if same:
                    chosen[slot] = same[0]
                    unused.remove(same[0])
            for slot in slots:
                source[layer, slot] = chosen[slot] if slot in chosen else unused.pop(0)
    return source
