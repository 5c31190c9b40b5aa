"""Maps between slots and experts, and how evenly they spread a load."""

from __future__ import annotations

import numpy as np

from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape

__all__ = [
    "balancedness",
    "gpu_loads",
    "holders",
    "initial_map",
    "keeps_groups_on_nodes",
    "logical_maps",
    "preserved_slots",
    "replica_counts",
]


def initial_map(shape: Shape) -> IntArray:
    """The map before any load is known: on each node its experts in order, then the first of them again.

    Args:
        shape: the numbers.

    Returns:
        [P]; with one node `[0 .. E-1]` and `[i % E for i in range(P - E)]`.
    """
    shape = shape.planned()
    experts = np.arange(shape.num_experts).reshape(shape.num_nodes, -1)
    wrapped = np.arange(shape.num_replicas // shape.num_nodes) % experts.shape[1]
    return experts[:, wrapped].reshape(-1)


def replica_counts(phy2log: IntArray, num_experts: int) -> IntArray:
    """Replicas of each expert: [L, E], of a map [L, P] in which -1 holds none."""
    num_layers = len(phy2log)
    bins = np.arange(num_layers)[:, None] * (num_experts + 1) + phy2log + 1
    counts = np.bincount(bins.reshape(-1), minlength=num_layers * (num_experts + 1))
    return counts.reshape(num_layers, num_experts + 1)[:, 1:].astype(np.int64)


def logical_maps(phy2log: IntArray, num_experts: int, width: int | None = None) -> tuple[IntArray, IntArray]:
    """Where the replicas of each expert are, in the order of slots.

    Args:
        phy2log: [L, P]; -1 holds no expert.
        num_experts: E.
        width: places for slots of one expert; None: as many as the most that one has.

    Returns:
        log2phy [L, E, width] filled up with -1, and the replicas of each expert, [L, E].
    """
    counts = replica_counts(phy2log, num_experts)
    if width is None:
        width = int(counts.max(initial=0))
    log2phy = np.full((*counts.shape, width), -1, np.int64)
    order = np.argsort(phy2log, axis=1, kind="stable")
    experts = np.take_along_axis(phy2log, order, axis=1)
    # Within a row slots now lie expert by expert: a number is the distance from the first of its expert.
    ends = np.cumsum(counts, axis=1) + (phy2log < 0).sum(axis=1, keepdims=True)
    starts = np.take_along_axis(ends - counts, np.maximum(experts, 0), axis=1)
    layers, places = np.nonzero(experts >= 0)
    numbers = places - starts[layers, places]
    log2phy[layers, experts[layers, places], numbers] = order[layers, places]
    return log2phy, counts


def gpu_loads(
    phy2log: IntArray, load: LoadArray, num_gpus: int, share: FloatArray | None = None
) -> FloatArray:
    """The load of each GPU.

    Args:
        phy2log: [L, P].
        load: [L, E].
        num_gpus: G.
        share: [L, P], the part of its expert's tokens that each slot takes; None: an even one.

    Returns:
        [L, G].
    """
    values = np.asarray(load, np.float64)
    if share is None:
        share = np.take_along_axis(
            1 / np.maximum(replica_counts(phy2log, values.shape[1]), 1), phy2log, axis=1
        )
    of_slots = np.take_along_axis(values, phy2log, axis=1) * share
    loads: FloatArray = of_slots.reshape(len(phy2log), num_gpus, phy2log.shape[1] // num_gpus).sum(axis=2)
    return loads


def balancedness(
    phy2log: IntArray, load: LoadArray, num_gpus: int, share: FloatArray | None = None
) -> FloatArray:
    """Mean load of a GPU over that of the busiest one: [L], from 0 to 1; 1 for a layer without load.

    Args:
        phy2log: [L, P].
        load: [L, E].
        num_gpus: G.
        share: [L, P], the part of its expert's tokens that each slot takes; None: an even one.
    """
    loads = gpu_loads(phy2log, load, num_gpus, share)
    peak = loads.max(axis=1)
    even: FloatArray = np.ones_like(peak)
    np.divide(loads.mean(axis=1), peak, out=even, where=peak > 0)
    return even


def holders(
    phy2log: IntArray, num_experts: int, num_gpus: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Whether each GPU has a replica of each expert: bool [L, G, E], of a map without -1."""
    num_layers, num_slots = phy2log.shape
    held = np.zeros((num_layers, num_gpus, num_experts), bool)
    gpus = np.arange(num_slots) // (num_slots // num_gpus)
    held[np.arange(num_layers)[:, None], gpus, phy2log] = True
    return held


def keeps_groups_on_nodes(phy2log: IntArray, shape: Shape) -> bool:
    """Whether every group of experts is on one node in every layer of a map [L, P]."""
    node = np.arange(shape.num_replicas) // (shape.num_replicas // shape.num_nodes)
    group = phy2log // (shape.num_experts // shape.num_groups)
    seen = np.zeros((len(phy2log), shape.num_groups, shape.num_nodes), bool)
    seen[np.arange(len(phy2log))[:, None], group, node] = True
    return bool((seen.sum(axis=2) == 1).all())


def preserved_slots(old: IntArray, new: IntArray, num_gpus: int) -> IntArray:
    """Where the entries of each GPU go, so that experts which stay on it keep their slots.

    Args:
        old: [L, P], the map in force; -1 holds no expert.
        new: [L, P], the map to come.
        num_gpus: ranks that share the slots.

    Returns:
        [L, P]: for each slot the slot of `new` whose entry goes there, on the same GPU.
    """
    size = new.shape[1] // num_gpus
    before, after = old.reshape(-1, size), new.reshape(-1, size)
    rows = np.arange(len(after))
    used = np.zeros(after.shape, bool)
    source = np.full(after.shape, -1)
    for slot in range(size):
        same = (after == before[:, slot, None]) & ~used
        kept = rows[same.any(axis=1)]
        entry = same[kept].argmax(axis=1)
        source[kept, slot] = entry
        used[kept, entry] = True
    # As many entries are left as slots, and both are taken in order.
    source[source < 0] = np.nonzero(~used)[1]
    starts = np.arange(num_gpus) * size
    found: IntArray = (source.reshape(-1, num_gpus, size) + starts[None, :, None]).reshape(new.shape)
    return found
